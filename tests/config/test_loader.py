"""A launch file is read strictly; every mistake is answered with the key, the fix and the line."""

import dataclasses
import pickle

import pytest

from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import from_dict, load_config, to_yaml
from qerl_rl.config.schema import Config

VALID = """
run: {steps: 3, output_dir: outputs/x}
model:
  path: some/model
data:
  train_path: arithmetic
"""


def write(folder, text):
    path = folder / "launch.yaml"
    path.write_text(text)
    return path


def test_file_overrides_and_defaults_merge(tmp_path):
    loaded = load_config(write(tmp_path, VALID), ["run.steps=5", "train.learning_rate=1e-3", "lora.experts=false"])
    assert loaded.config.run.steps == 5
    assert loaded.config.train.learning_rate == 1e-3
    assert loaded.config.lora.experts is False
    assert loaded.config.rollout == Config().rollout


def test_a_band_keeps_its_underscore_which_yaml_drops_from_numbers(tmp_path):
    text = VALID + "rollout_correction: {rollout_is_threshold: 0.5_5, rollout_rs: token_k1}\n"
    loaded = load_config(write(tmp_path, text), ["rollout_correction.rollout_rs_threshold=1_3"])
    check_config(loaded.config, loaded.locate)
    correction = loaded.config.rollout_correction
    assert correction.is_band == (0.5, 5.0)
    assert correction.rs_bands == (("token_k1", 1.0, 3.0),)
    assert load_config(write(tmp_path, to_yaml(loaded.config))).config == loaded.config
    interpolated = load_config(write(tmp_path, VALID + "rollout_correction: {rollout_is_threshold: '${run.steps}'}\n"))
    assert interpolated.config.rollout_correction.is_band == (0.0, 3.0)


def test_a_section_written_for_verl_reads_as_it_does_there(tmp_path):
    """The defaults of its trainer/config/algorithm/rollout_correction.yaml, and a preset that uses most keys."""
    keys = "rollout_is: null, rollout_is_threshold: 2.0, rollout_rs: null, rollout_rs_threshold: null"
    more = "bypass_mode: false, loss_type: ppo_clip, rollout_is_batch_normalize: false"
    loaded = load_config(write(tmp_path, VALID + f"rollout_correction: {{{keys}, {more}}}\n"))
    check_config(loaded.config, loaded.locate)
    assert loaded.config.rollout_correction == Config().rollout_correction
    keys = "rollout_is: sequence, rollout_rs: 'seq_mean_k1, seq_mean_k1', rollout_rs_threshold: 0.999_1.001"
    more = "bypass_mode: true, loss_type: reinforce, rollout_is_batch_normalize: true"
    loaded = load_config(write(tmp_path, VALID + f"rollout_correction: {{{keys}, {more}}}\n"))
    check_config(loaded.config, loaded.locate)
    assert loaded.config.rollout_correction.rs_bands == (("seq_mean_k1", 0.999, 1.001),)


def test_interpolation_resolves(tmp_path):
    path = write(tmp_path, VALID + "checkpoint: {every: '${run.steps}'}\n")
    assert load_config(path).config.checkpoint.every == 3


def test_config_survives_the_trip_to_another_process(tmp_path):
    text = "cluster: {environment: {A: 1}}\nrollout: {ascend: {capture_sizes: [1, 8], fused_mc2: 1}}\n"
    config = load_config(write(tmp_path, VALID + text)).config
    assert config.rollout.ascend.capture_sizes == [1, 8]
    assert from_dict(dataclasses.asdict(config)) == config
    assert load_config(write(tmp_path, to_yaml(config))).config == config


@pytest.mark.parametrize(
    ("extra", "overrides", "problem", "fix", "where"),
    [
        ("train:\n  tensor_paralel: 2\n", [], "unknown key train.tensor_paralel", "train.tensor_parallel", ":8"),
        ("trian: {}\n", [], "unknown key trian", "write train", ":7"),
        ("run2: {}\n", [], "unknown key run2", "run", ":7"),
        ("", ["rollout.learning_rate=1"], "unknown key rollout.learning_rate", "train.learning_rate", "command line"),
        ("train: {learning_rate: fast}\n", [], "train.learning_rate='fast' is not a number", "number", ":7"),
        ("", ["run.steps=1.5"], "run.steps=1.5 is not a whole number", "whole number", "command line"),
        ("reward: {functions: {math: much}}\n", [], "functions.math='much' is not a number", "a number", ":7"),
        ("reward: {functions: {math: }}\n", [], "functions.math=None is not a number", "a number", ":7"),
        ("reward: {functions: [math]}\n", [], "functions=['math'] is not a mapping", "KEY: value", ":7"),
        ("", ["noise=3"], "noise=3 is no section", "below noise", "command line"),
        ("", ["rollout.ascend.sleep=1"], "unknown key rollout.ascend.sleep", "rollout.ascend.sleep_mode", "line"),
        ("rollout: {ascend: {capture_sizes: 8}}\n", [], "capture_sizes=8 is no list", "as [1, 2, 4]", ":7"),
        ("", ["rollout.ascend.capture_sizes=[1, 2.5]"], "is no list of whole numbers", "as [1, 2, 4]", "line"),
        ("", ["data.prompt_template={a} {b}"], "value of data.prompt_template is not", "put quotes", "command line"),
        ("", ["steps"], "'steps' is not an override", "section.key=value", "command line"),
        ("train: {learning_rate: '${no.such}'}\n", [], "no.such", "interpolation", "launch.yaml"),
        ("a: [\n", [], "not readable YAML", "correct", "launch.yaml"),
    ],
)
def test_wrong_input_is_answered_with_a_fix(tmp_path, extra, overrides, problem, fix, where):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, VALID + extra), overrides)
    error = caught.value
    assert problem in error.problem
    assert fix in error.fix
    assert error.where.endswith(where)
    assert "\n" not in str(error)


def test_an_error_survives_the_trip_from_another_process():
    error = ConfigError("a is 3.", fix="set a to 4", where="x.yaml:1")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problem, copy.fix, copy.where, str(copy)) == (error.problem, error.fix, error.where, str(error))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no launch file"):
        load_config(tmp_path / "absent.yaml")


def test_weights_of_rewards_come_from_the_file_and_the_command_line(tmp_path):
    path = write(tmp_path, VALID + "reward:\n  functions:\n    math: 1\n    own.module.reward: -0.5\n")
    config = load_config(path, ["reward.functions.format=2e-1"]).config
    assert config.reward.weights == {"math": 1.0, "own.module.reward": -0.5, "format": 0.2}
    assert all(type(weight) is float for weight in config.reward.weights.values())
    assert from_dict(dataclasses.asdict(config)) == config
    assert load_config(write(tmp_path, to_yaml(config))).config == config


def test_a_single_reward_weighs_one_and_exact_is_the_default(tmp_path):
    assert load_config(write(tmp_path, VALID)).config.reward.weights == {"exact": 1.0}
    assert load_config(write(tmp_path, VALID), ["reward.function=math"]).config.reward.weights == {"math": 1.0}


@pytest.mark.parametrize(
    ("overrides", "problem", "fix"),
    [
        (["train.tensor_parallel=3"], "does not divide cluster.workers=2", "multiple of 3"),
        (["train.pipeline_parallel=2", "train.layers_per_stage=2,x"], "2,x are no numbers", "write 2 numbers"),
        (["train.layers_per_stage=3,2"], "3,2 are 2 stages, train.pipeline_parallel is 1", "pipeline_parallel to 2"),
        (["train.expert_parallel=4"], "train.expert_parallel=4", "divisor of 2"),
        (
            ["train.tensor_parallel=2", "train.sequence_parallel=false"],
            "without sequence parallelism",
            "train.sequence_parallel",
        ),
        (["train.expert_tensor_parallel=2"], "is neither 1 nor", "set train.expert_tensor_parallel to 1"),
        (["rollout.tensor_parallel=2"], "is not cluster.workers=2", "rollout.data_parallel to 1"),
        (["algorithm.prompts_per_mini_batch=3"], "does not divide algorithm.prompts_per_step=16", "divisor of 16"),
        (
            ["algorithm.prompts_per_step=1", "algorithm.prompts_per_mini_batch=1", "algorithm.samples_per_prompt=3"],
            "do not divide over 2 data-parallel ranks",
            "multiple of 2",
        ),
        (["model.max_length=100"], "exceed model.max_length=100", "256"),
        (["algorithm.samples_per_prompt=1"], "algorithm.samples_per_prompt=1 is too small", "2 or more"),
        (["algorithm.name=ppo"], "not from algorithm.advantage=grpo", "set algorithm.advantage to gae"),
        (["algorithm.advantage=gae"], "algorithm.advantage=gae needs a critic", "set algorithm.name to ppo"),
        (["algorithm.gae_lambda=1.5"], "algorithm.gae_lambda=1.5 is no share", "1 or less"),
        (["critic.value_clip=0"], "critic.value_clip=0.0 is not positive", "above 0"),
        (["critic.head_start_steps=-1"], "critic.head_start_steps=-1 is too small", "0 or more"),
        (
            ["algorithm.name=ppo", "algorithm.advantage=gae", "rollout.ahead=true"],
            "the critic has no turn",
            "set rollout.ahead to false",
        ),
        (
            ["reward_model.path=m", "reward_model.backend=megatron", "rollout.ahead=true"],
            "the reward model has no turn",
            "set rollout.ahead to false",
        ),
        (
            [
                *("reward_model.path=m", "reward_model.backend=megatron"),
                *("algorithm.name=dapo", "algorithm.sampling_rounds=2"),
            ],
            "asks for rewards during it",
            "set reward_model.backend to hf",
        ),
        (
            ["reward_model.path=m", "reward_model.backend=megatron", "algorithm.name=dpo"],
            "dpo has no rewards",
            "leave reward_model.path empty",
        ),
        (["reward_model.backend=vllm"], "reward_model.backend=vllm is unknown", "hf or megatron"),
        (["model.share_base=always"], "model.share_base=always is unknown", "auto or never"),
        (["swap.checksum=sometimes"], "swap.checksum=sometimes is unknown", "never or first or always"),
        (["swap.canary_tolerance=-1"], "swap.canary_tolerance=-1.0 is too small", "0 or more"),
        (["swap.bucket_bytes=1000"], "swap.bucket_bytes=1000 is too small", "1024 or more"),
        (["swap.release_weights=true", "rollout.ahead=true"], "keeps both engines at work", "release_weights to false"),
        (["train.dtype=float64"], "train.dtype=float64 is unknown", "float32 or bfloat16"),
        (["rollout.temperature=0"], "rollout.temperature=0.0 is not positive", "above 0"),
        (["lora.attention=false", "lora.experts=false"], "nothing would train", "true"),
        (["quant.format=none", "lora.in_rollout=adapter"], "beside int8 experts only", "lora.in_rollout to auto"),
        (["lora.in_rollout=adapter", "lora.merge_rounding=nearest"], "rounds nothing", "lora.merge_rounding to sto"),
        (["model.path="], "model.path is empty", "make-model"),
        (["reward.function=exact", "reward.functions.math=1"], "are both set", "move exact into reward.functions"),
        (["reward.functions={math: .inf}"], "reward.functions.math=inf is no weight", "finite"),
        (["reward.functions={math: 0, format: 0}"], "every weight in reward.functions is 0", "another number"),
        (["reward.memory_bytes=-1"], "reward.memory_bytes=-1 is too small", "0 or more"),
        (["reward.length_characters=0"], "reward.length_characters=0 is too small", "1 or more"),
        (["data.max_prompt_tokens=129"], "exceeds rollout.max_prompt_tokens=128", "to 128 or less"),
        (["eval.samples=0"], "eval.samples=0 is too small", "1 or more"),
        (["eval.temperature=0"], "eval.temperature=0.0 is not positive", "above 0"),
        (["rollout.max_batched_tokens=100"], "is less than model.max_length=512", "rollout.chunked_prefill to true"),
        (["rollout.chunked_prefill=true", "rollout.max_batched_tokens=100"], "rollout.max_sequences=128", "to 128"),
        (["rollout.kv_cache_dtype=int4"], "rollout.kv_cache_dtype=int4 is unknown", "or int8"),
        (["rollout.ascend.weight_nz_mode=3"], "rollout.ascend.weight_nz_mode=3 is unknown", "to 0 or 1 or 2"),
        (["rollout.ascend.eplb_collection_steps=0"], "eplb_collection_steps=0 is too small", "1 or more"),
        (["rollout.carry_prompts=-1"], "rollout.carry_prompts=-1 is too small", "0 or more"),
        (["rollout.carry_max_age=0"], "rollout.carry_max_age=0 is too small", "1 or more"),
        (
            ["noise.enabled=true", "noise.log_probs=noisy", "rollout.carry_prompts=2"],
            "rollout.carry_prompts=2 carries over have the noise of several steps",
            "set noise.log_probs to clean",
        ),
        (
            ["noise.enabled=true", "noise.log_probs=noisy", "rollout_correction.bypass_mode=true"],
            "takes no old log-probs",
            "set noise.log_probs to clean",
        ),
        (["noise.schedule=step"], "noise.schedule=step is unknown", "exponential or linear"),
        (["rollout.carry_prompts=17"], "is more than algorithm.prompts_per_step=16", "to 16 or less"),
        (["rollout.carry_prompts=2", "rollout.ahead=true"], "exclude each other", "rollout.carry_prompts to 0"),
        (
            ["rollout.carry_prompts=2", "algorithm.prompts_per_step=15", "algorithm.prompts_per_mini_batch=15"],
            "does not divide over rollout.data_parallel=2 engines",
            "multiple of 2",
        ),
        (
            ["rollout.carry_prompts=2", "algorithm.name=dapo"],
            "rollout.carry_prompts=2, but algorithm.name=dapo samples until it has enough",
            "set rollout.carry_prompts to 0, or algorithm.name to grpo",
        ),
        (["rollout.ahead=true", "algorithm.name=dapo"], "rollout.ahead=true, but", "set rollout.ahead to false"),
        (["rollout.carry_prompts=2", "algorithm.name=dpo"], "without a rollout", "rollout.carry_prompts to 0"),
        (["rollout.ahead=true", "algorithm.name=dpo"], "without a rollout", "rollout.ahead to false"),
        (["rollout_correction.rollout_is=token", "algorithm.name=dpo"], "without a rollout", "to none"),
        (
            ["router_replay.mode=R3", "algorithm.name=dpo"],
            "router_replay.mode=R3, but algorithm.name=dpo learns from pairs, without a rollout",
            "set router_replay.mode to disabled",
        ),
        (["router_replay.mode=R2"], "router_replay.mode=R2 is unknown", "disabled or R3"),
        (["rollout_correction.rollout_is=tokens"], "rollout_correction.rollout_is=tokens is unknown", "none or token"),
        (["rollout_correction.rollout_is_threshold=0"], "=0 is neither a positive number nor a band", "0.5_5.0"),
        (["rollout_correction.rollout_is_threshold=2_1"], "the band's first number is above its second", "0.5_5.0"),
        (["rollout_correction.rollout_is_threshold=high"], "=high is neither a number nor a band", "such as 2.0"),
        (["rollout_correction.rollout_rs=geometric"], "'geometric' is none of token_k1", "such as seq_mean_k3"),
        (
            ["rollout_correction.rollout_rs=seq_mean_k3"],
            "=(empty) is neither a number",
            "threshold to 0.5_2",
        ),
        (
            ["rollout_correction.rollout_rs=seq_mean_k3", "rollout_correction.rollout_rs_threshold=0.1_0.2"],
            "seq_mean_k3 takes one number",
            "a number for others",
        ),
        (
            ["rollout_correction.rollout_rs=seq_mean_k1", "rollout_correction.rollout_rs_threshold=0.9"],
            "a band from 1 / 0.9 to 0.9 holds nothing",
            "0.5_2.0 for k1",
        ),
        (
            ["rollout_correction.rollout_rs='token_k1,token_k3'", "rollout_correction.rollout_rs_threshold='1,2,3'"],
            "has 3 values, but rollout_rs 2 criteria",
            "rollout_rs_threshold",
        ),
        (["rollout_correction.rollout_rs_threshold=0.1"], "rollout_rs=none rejects nothing", "leave"),
        (["rollout_correction.rollout_token_veto_threshold=1.5"], "would reject what both engines agree", "1e-4"),
        (
            [
                "rollout_correction.rollout_rs=seq_mean_k3",
                "rollout_correction.rollout_rs_threshold=1",
                "algorithm.name=dpo",
            ],
            "without a rollout",
            "rollout_rs to none",
        ),
        (
            ["rollout_correction.rollout_is=token", "rollout_correction.bypass_mode=true"],
            "with rollout_correction.bypass_mode the ratio in the loss is that weight",
            "set rollout_correction.rollout_is to none, rollout_correction.loss_type to reinforce",
        ),
        (
            ["rollout_correction.rollout_is_batch_normalize=true"],
            "rollout_is=none has no weights to normalize",
            "set rollout_correction.rollout_is to token or sequence",
        ),
        (
            ["rollout_correction.loss_type=reinforce"],
            "without rollout_correction.bypass_mode the loss is algorithm.loss=ppo",
            "rollout_correction.bypass_mode to true",
        ),
        (
            [
                "rollout_correction.loss_type=reinforce",
                "rollout_correction.bypass_mode=true",
                "algorithm.loss=gspo",
            ],
            "rollout_correction.loss_type=reinforce takes its place",
            "leave algorithm.loss out",
        ),
        (["rollout_correction.loss_type=ppo"], "loss_type=ppo is unknown", "ppo_clip or reinforce"),
    ],
)
def test_keys_that_do_not_fit_each_other(tmp_path, overrides, problem, fix):
    loaded = load_config(write(tmp_path, VALID), overrides)
    with pytest.raises(ConfigError) as caught:
        check_config(loaded.config, loaded.locate)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where


def test_a_critic_needs_no_second_sample_of_a_prompt(tmp_path):
    overrides = ["algorithm.name=ppo", "algorithm.advantage=gae", "algorithm.samples_per_prompt=1"]
    loaded = load_config(write(tmp_path, VALID), overrides)
    check_config(loaded.config, loaded.locate)
    assert loaded.config.samples_per_step == loaded.config.algorithm.prompts_per_step


def test_derived_sizes_follow_the_keys(tmp_path):
    overrides = ["cluster.workers=8", "train.tensor_parallel=2", "train.pipeline_parallel=2", "rollout.data_parallel=8"]
    loaded = load_config(
        write(tmp_path, VALID), [*overrides, "algorithm.prompts_per_mini_batch=8", "algorithm.epochs_per_step=2"]
    )
    check_config(loaded.config, loaded.locate)
    assert loaded.config.train_data_parallel == 2
    assert loaded.config.samples_per_step == 128
    assert loaded.config.mini_batches_per_step == 4
    assert loaded.config.samples_per_rank_and_mini_batch == 32
    assert loaded.config.loss_constant_tokens == loaded.config.rollout.max_response_tokens
    named = load_config(write(tmp_path, VALID), ["algorithm.loss_constant_tokens=7"])
    assert named.config.loss_constant_tokens == 7
