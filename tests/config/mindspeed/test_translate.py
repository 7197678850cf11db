"""Launch files of MindSpeed-RL say here what they say there, and what can't be done is named in their words."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.config.mindspeed import Translation, tables
from qerl_rl.config.schema import Config
from tests.config.mindspeed.conftest import grpo

Load = Callable[..., LoadedConfig]
Translated = Callable[[dict], Translation]


def with_keys(changes: dict) -> dict:
    """The launch file with `section.key` or `section.key.key` set, None taking a key away."""
    sections = grpo()
    for name, value in changes.items():
        *path, key = name.split(".")
        place = sections
        for part in path:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(key, None)
        else:
            place[key] = value
    return sections


def test_a_launch_file_passes_all_checks_as_it_is(load: Load) -> None:
    loaded = load(grpo())
    check_config(loaded.config, loaded.locate)
    config = loaded.config
    assert (config.run.name, config.run.steps, config.run.seed) == ("grpo_small", 20, 7)
    assert (config.model.path, config.data.train_path) == ("some/folder", "some/prompts.jsonl")
    # Batch sizes of both count prompts: 16 prompts x 8 samples are a mini-batch.
    assert (config.samples_per_step, config.samples_per_mini_batch, config.mini_batches_per_step) == (256, 128, 2)
    assert (config.cluster.workers, config.train_data_parallel, config.rollout.data_parallel) == (16, 4, 8)
    assert config.reward.weights == {"acc": 1.0, "format": 0.5}
    assert config.quant.format == "none"


BLOCK, LAYERS, BALANCING = "train.recompute_method", "train.recompute_layers", "train.router_load_balancing"
PROFILE, PROFILE_END = "profiler_config.integrated.profile", "profiler_config.integrated.profile_step_end"
STAGES = "actor_config.pipeline_model_parallel_size"
MAPPINGS = [
    ({"actor_config.bf16": False}, "train.dtype", "float32"),
    ({}, "train.expert_parallel", 2),
    ({}, "train.expert_tensor_parallel", 4),
    ({"actor_config.moe_tp_extend_ep": True}, "train.expert_parallel", 8),
    ({"actor_config.moe_tp_extend_ep": True}, "train.expert_tensor_parallel", 1),
    ({}, "train.token_dispatcher", "alltoall"),
    ({"actor_config.moe_token_dispatcher_type": "allgather"}, "train.token_dispatcher", "allgather"),
    ({"actor_config.recompute_granularity": "full"}, "train.recompute", "full"),
    ({"actor_config.recompute_granularity": "full", "actor_config.recompute_method": "block"}, BLOCK, "block"),
    ({"actor_config.recompute_granularity": "full", "actor_config.recompute_num_layers": 3}, LAYERS, 3),
    ({"actor_config.recompute_num_layers": 3}, LAYERS, 1),
    ({"actor_config.pipeline-model-parallel-size": 2}, "train.pipeline_parallel", 2),
    # Four layers in three stages, five with an empty one; stages that differ in the middle are evened out.
    ({STAGES: 3, "actor_config.num_layer_list": "1,1,2"}, "train.layers_per_stage", "1,1,2"),
    ({STAGES: 2, "actor_config.num_layer_list": [2, 2]}, "train.layers_per_stage", ""),
    ({STAGES: 8, "actor_config.num_layer_list": "7,7,8,8,8,8,8,7"}, "train.layers_per_stage", "7,8,8,8,8,8,8,6"),
    ({STAGES: 4, "actor_config.num_layer_list": "1,2,5,1"}, "train.layers_per_stage", "2,3,3,1"),
    (
        {STAGES: 16, "actor_config.num_layers": 96, "actor_config.noop_layers": "5,95"},
        "train.layers_per_stage",
        "5,6,6,6,6,6,6,6,6,6,6,6,6,6,6,5",
    ),
    ({"megatron_training.npu_deterministic": True}, "run.deterministic", True),
    ({"megatron_training.use_flash_attn": False}, "train.mindspeed.use_flash_attn", False),
    ({"actor_config.use_fused_rmsnorm": False}, "train.mindspeed.use_fused_rmsnorm", False),
    ({}, "train.mindspeed.use_fused_swiglu", True),
    ({"actor_config.moe_router_load_balancing_type": "sinkhorn"}, BALANCING, "sinkhorn"),
    ({"actor_config.moe_router_load_balancing_type": "seq_aux_loss"}, BALANCING, "auto"),
    ({"actor_config.moe_router_load_balancing_type": "aux_loss"}, BALANCING, "auto"),
    ({"actor_config.moe_aux_loss_coeff": 0.01}, BALANCING, "aux_loss"),
    ({"actor_config.moe_aux_loss_coeff": 0.01}, "train.router_aux_loss_coefficient", 0.01),
    (
        {"actor_config.moe_aux_loss_coeff": 0.01, "actor_config.lora_target_modules": ["linear_qkv"]},
        BALANCING,
        "auto",
    ),
    ({}, "train.adam_beta2", 0.999),
    ({"megatron_training.adam_beta2": 0.95}, "train.adam_beta2", 0.95),
    ({"actor_config.clip_grad": 0.5}, "train.max_grad_norm", 0.5),
    ({"megatron_training.lr": 1e-5}, "train.learning_rate", 1e-6),
    # A tenth of 20 steps with 2 updates each.
    ({"actor_config.lr_warmup_fraction": 0.1}, "train.warmup_steps", 4),
    ({"actor_config.save": "out/here"}, "run.output_dir", "out/here"),
    ({"actor_config.save_interval": 5}, "checkpoint.every", 5),
    ({"megatron_training.no_shuffle": True}, "data.shuffle", False),
    # 2 samples of 48 tokens.
    ({}, "train.micro_batch_tokens", 96),
    (
        {"rl_config.use_dynamic_bsz": True, "rl_config.update_max_packing_token_size": 77},
        "train.micro_batch_tokens",
        77,
    ),
    ({"rl_config.use_dynamic_bsz": True}, "train.micro_batch_tokens", 4096),
    ({"rl_config.gamma": 0.9}, "algorithm.discount", 0.9),
    ({"rl_config.lam": 0.8}, "algorithm.gae_lambda", 0.8),
    ({}, "algorithm.advantage", "grpo"),
    ({"rl_config.epochs": 2}, "algorithm.epochs_per_step", 2),
    ({"rl_config.entropy_coeff": 0.01}, "algorithm.entropy_coefficient", 0.01),
    ({}, "algorithm.kl_estimator", "k3"),
    ({"rl_config.kl_penalty": "kl"}, "algorithm.kl_estimator", "k1"),
    ({"rl_config.kl_penalty": "abs"}, "algorithm.kl_estimator", "abs"),
    ({"rl_config.kl_penalty": "mse"}, "algorithm.kl_estimator", "mse"),
    ({}, "algorithm.kl_coefficient", 0.001),
    ({"megatron_training.stage": "ray_dapo"}, "algorithm.kl_coefficient", 0.0),
    ({"rl_config.kl_ctrl_type": "adaptive", "rl_config.kl_target": 3.0}, "algorithm.kl_target", 3.0),
    ({"rl_config.kl_ctrl_type": "adaptive", "rl_config.kl_horizon": 50}, "algorithm.kl_horizon", 50),
    ({"rl_config.kl_target": 3.0}, "algorithm.kl_target", 0.0),
    ({"rl_config.clip_ratio": 0.1}, "algorithm.clip_high", 0.1),
    ({"rl_config.clip_higher_enable": True, "rl_config.clip_ratio_high": 0.28}, "algorithm.clip_high", 0.28),
    ({"rl_config.clip_higher_enable": True}, "algorithm.clip_low", 0.1),
    ({"rl_config.clip_ratio_high": 0.28}, "algorithm.clip_high", 0.2),
    ({"rl_config.token_level_loss": False}, "algorithm.loss_aggregation", "sequence_mean"),
    ({"rl_config.overlong_buffer_enable": True, "rl_config.overlong_buffer": 4}, "algorithm.overlong_buffer_tokens", 4),
    ({"rl_config.overlong_buffer": 4}, "algorithm.overlong_buffer_tokens", 0),
    (
        {"rl_config.overlong_buffer_enable": True, "rl_config.overlong_buffer_penalty_factor": 0.1},
        "algorithm.overlong_penalty",
        0.1,
    ),
    # Longer ones are left out there.
    ({}, "data.max_prompt_tokens", 24),
    ({"rl_config.verifier_parallel": 4}, "reward.workers", 4),
    ({"rl_config.verifier_timeout": 120}, "reward.timeout_s", 120.0),
    ({"rl_config.use_tensorboard": True}, "track.tensorboard", True),
    ({"rl_config.partial_rollout_max_split": 3}, "rollout.carry_prompts", 32),
    ({"rl_config.partial_rollout_max_split": 3}, "rollout.carry_max_age", 2),
    ({"rl_config.hccl_buffersize": 640}, "cluster.environment", {"HCCL_BUFFSIZE": "640"}),
    ({"generate_config.enable_expert_parallel": True}, "rollout.expert_parallel", True),
    ({}, "rollout.expert_parallel", False),
    ({"generate_config.enforce_eager": False}, "rollout.enforce_eager", False),
    ({"generate_config.enable_prefix_caching": True}, "rollout.prefix_caching", True),
    ({"generate_config.offload_train_param": True}, "swap.offload_parameters", True),
    ({"generate_config.offload_train_grad": True}, "swap.offload_gradients", True),
    ({"generate_config.offload_train_optimizer": True}, "swap.offload_optimizer", True),
    ({}, "rollout.max_sequences", 8),
    ({"generate_config.max_num_batched_tokens": 16}, "rollout.max_batched_tokens", 16),
    ({"generate_config.max_num_batched_tokens": 16}, "rollout.chunked_prefill", True),
    ({}, "rollout.chunked_prefill", False),
    ({"generate_config.sampling_config.max_tokens": 30}, "model.max_length", 54),
    ({"generate_config.sampling_config.min_p": 0.01}, "rollout.min_p", 0.01),
    (
        {"generate_config.expert_map_path": "map.json", "generate_config.infer_expert_parallel_size": 16},
        "rollout.ascend.expert_map_path",
        "map.json",
    ),
    ({"generate_config.expert_map_path": "map.json"}, "rollout.ascend.expert_map_path", ""),
    # Keys and values of 4 layers, 2 of 4 heads a rank, 16 wide, 2 bytes each; 8 sequences of 48 tokens.
    ({}, "rollout.kv_cache_bytes", 2 * 4 * 2 * 16 * 2 * 8 * 48),
    # Half of a quarter of 64 GiB, where that is less than what these sequences need (256 MiB each, in rows of 512 B).
    (
        {
            "generate_config.gpu_memory_utilization": 0.25,
            "generate_config.max_model_len": 1 << 20,
            "generate_config.max_num_seqs": 64,
        },
        "rollout.kv_cache_bytes",
        8 << 30,
    ),
    ({"actor_config.npu_deterministic": True}, "run.deterministic", True),
    ({"generate_config.sampling_config.top_k": 50}, "rollout.top_k", 50),
    ({}, "rollout.top_k", 0),
    ({"generate_config.sampling_config.top_p": 0.9}, "rollout.top_p", 0.9),
    ({"generate_config.sampling_config.temperature": None}, "rollout.temperature", 0.2),
    # Without adapters every weight trains.
    ({"actor_config.lora_r": 64}, "lora.rank", 0),
    ({"actor_config.lora_target_modules": ["linear_qkv", "linear_proj"]}, "lora.experts", False),
    ({"actor_config.lora_target_modules": ["linear_fc1", "linear_fc2"]}, "lora.attention", False),
    ({"actor_config.lora_target_modules": ["linear_qkv"], "actor_config.lora_r": 64}, "lora.rank", 64),
    ({"actor_config.lora_target_modules": ["linear_qkv"]}, "lora.alpha", 16.0),
    ({"profiler_config.integrated.profile": True}, "profiler.steps", [1]),
    ({"profiler_config.integrated.profile_step_start": 3}, "profiler.steps", []),
    ({PROFILE: True, PROFILE_END: 4}, "profiler.steps", [1, 2, 3]),
    ({PROFILE: True, "profiler_config.integrated.stage": "actor_generate"}, "profiler.stages", ["rollout"]),
    ({PROFILE: True}, "profiler.ranks", list(range(16))),
    ({PROFILE: True, "profiler_config.integrated.profile_ranks": [0, 3]}, "profiler.ranks", [0, 3]),
    ({PROFILE: True, "profiler_config.integrated.profile_level": "level_none"}, "profiler.level", "none"),
    ({PROFILE: True}, "profiler.kind", "msprof"),
]


@pytest.mark.parametrize(("changes", "key", "expected"), MAPPINGS, ids=[f"{m[1]}-{i}" for i, m in enumerate(MAPPINGS)])
def test_each_key_means_what_it_means_there(translated: Translated, changes: dict, key: str, expected: object) -> None:
    found: Any = translated(with_keys(changes)).values
    for name in key.split("."):
        found = found.get(name, {})
    assert (functools.reduce(getattr, key.split("."), Config()) if found == {} else found) == expected


DAPO = {
    "megatron_training.stage": "ray_dapo",
    "rl_config.filter_groups_enable": True,
    "rl_config.filter_groups_train_batch_size": 16,
}


def test_dapo_learns_from_as_many_prompts_as_the_filter_keeps(load: Load) -> None:
    loaded = load(with_keys(DAPO | {"rl_config.filter_groups_max_batches": 3}))
    check_config(loaded.config, loaded.locate)
    algorithm = loaded.config.algorithm
    assert (algorithm.name, algorithm.prompts_per_step, algorithm.sampling_rounds) == ("dapo", 16, 3)
    without = load(with_keys(DAPO | {"rl_config.filter_groups_enable": False})).config.algorithm
    assert (without.prompts_per_step, without.sampling_rounds) == (32, 1)


def test_a_filter_without_a_limit_gets_one_and_says_so(load: Load) -> None:
    unlimited = with_keys(DAPO | {"rl_config.filter_groups_max_batches": -1})
    said = [sentence for sentence in load(unlimited).translation.differs if "filter_groups_max_batches=-1" in sentence]
    assert "algorithm.sampling_rounds" in said[0]
    settled = load(unlimited, "algorithm.sampling_rounds=4")
    assert settled.config.algorithm.sampling_rounds == 4
    assert not any("filter_groups_max_batches" in sentence for sentence in settled.translation.differs)


def test_ppo_has_its_critic_and_kl_in_the_reward_only(load: Load) -> None:
    changes = {
        "megatron_training.stage": "ray_ppo",
        "rl_config.adv_estimator": "gae",
        "critic_config.lr": 5e-6,
        "critic_config.model": "small_moe",
    }
    loaded = load(with_keys(changes))
    check_config(loaded.config, loaded.locate)
    assert (loaded.config.algorithm.name, loaded.config.algorithm.kl_coefficient) == ("ppo", 0.0)
    assert (loaded.config.critic.learning_rate, loaded.config.critic.value_clip) == (5e-6, 0.5)
    rewarded = load(with_keys(changes | {"rl_config.use_kl_in_reward": True})).config.algorithm
    assert (rewarded.kl_coefficient, rewarded.kl_in) == (0.001, "reward")


def test_dpo_needs_the_training_section_alone(load: Load) -> None:
    sections = grpo()
    training = {**sections["megatron_training"], **sections["actor_config"], "stage": "dpo", "dpo_loss_type": "sigmoid"}
    loaded = load({"defaults": sections["defaults"], "megatron_training": training})
    check_config(loaded.config, loaded.locate)
    config = loaded.config
    assert (config.algorithm.name, config.dpo.loss, config.samples_per_step) == ("dpo", "dpo", 64)
    assert (config.model.max_length, config.rollout.max_prompt_tokens) == (48, 24)
    # The smallest number of cards that this layout has: 4 x 2.
    assert config.cluster.workers == 8


FAULTS = [
    ({"actor_config.context_parallel_size": 2}, "actor_config.context_parallel_size=2", "grpo_small.yaml:", ""),
    (
        {STAGES: 2, "actor_config.num_layer_list": "4"},
        "actor_config.num_layer_list=4",
        "train.layers_per_stage",
        "train.layers_per_stage=2,2",
    ),
    ({"actor_config.lr_decay_style": "cosine"}, "lr_decay_style=cosine", "constant", "train.warmup_steps=0"),
    (
        {"actor_config.lr_decay_style": None},
        "lr_decay_style",
        "linear by default",
        "actor_config.lr_decay_style=constant",
    ),
    ({"rl_config.multi_turn_enable": True}, "multi_turn_enable=true", "no tools", "rl_config.multi_turn_enable=false"),
    ({"megatron_training.data_path": "./data"}, "data_path=./data", "data.train_path", "data.train_path=x.jsonl"),
    ({PROFILE: True, "profiler_config.integrated.stage": "x"}, "stage=x", "actor_generate", "profiler.stages=[update]"),
    ({"rl_config.verifier_weight": [1.0]}, "verifier_weight=[1.0]", "one weight", ""),
    ({"rl_config.actor_resource": None}, "rl_config.actor_resource", "num_npus", "cluster.workers=16"),
    (
        {"megatron_training.stage": "ray_dapo", "rl_config.partial_rollout_max_split": 2},
        "partial_rollout_max_split=2",
        "only grpo",
        "rl_config.partial_rollout_max_split=1",
    ),
]


@pytest.mark.parametrize(("changes", "named", "fix", "settled"), FAULTS, ids=[fault[1] for fault in FAULTS])
def test_what_can_not_be_followed_is_named_with_its_line_and_settled_by_an_override(
    load: Load, changes: dict, named: str, fix: str, settled: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(with_keys(changes))
    assert named in caught.value.problem
    assert fix in caught.value.problem
    if settled:
        load(with_keys(changes), settled)


def test_all_that_is_not_done_comes_in_one_error(load: Load) -> None:
    changes = {"actor_config.context_parallel_size": 2, "rl_config.multi_turn_enable": True}
    with pytest.raises(ConfigError) as caught:
        load(with_keys(changes), model={"mm_model": "x"})
    for named in ("context_parallel_size=2", "multi_turn_enable=true", "model.small_moe.mm_model=x"):
        assert named in caught.value.problem
    assert "small_moe.yaml:" in caught.value.problem
    assert "\n" not in str(caught.value)


def test_preprocessed_prompts_are_taken_as_they_are_and_pairs_are_not(load: Load, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    Path(f"{prefix}_packed_input_ids_document.idx").touch()
    assert load(with_keys({"megatron_training.data_path": str(prefix)})).config.data.train_path == str(prefix)
    training = {**grpo()["megatron_training"], **grpo()["actor_config"], "stage": "dpo", "data_path": str(prefix)}
    with pytest.raises(ConfigError, match="preprocessed pairs are not read"):
        load({"defaults": grpo()["defaults"], "megatron_training": training})


def test_a_dense_model_is_named_and_another_folder_settles_it(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"actor_config\.model=small_moe .*dense model"):
        load(grpo(), model={"num_experts": None})
    load(grpo(), "model.path=some/moe", model={"num_experts": None})


def test_what_is_done_differently_and_what_has_no_effect_is_listed(load: Load) -> None:
    translation = load(
        with_keys(
            {"actor_config.load": "./ckpt", "actor_config.swap_optimizer": True, "megatron_training.shape_order": "SBH"}
        )
    ).translation
    assert any("actor_config.load=./ckpt" in item and "model.path=FOLDER" in item for item in translation.differs)
    assert {"megatron_training.shape_order", "rl_config.blocking"} <= set(translation.no_effect)
    assert any("actor_config.swap_optimizer=true: left out: it moves" in item for item in translation.differs)
    assert "model.small_moe.hidden_size" in translation.architecture
    described = translation.describe()
    assert "has no effect here: rl_config.{blocking}" in described
    assert all(sentence in described for sentence in translation.differs)


PLACES = (tables.ACTOR, tables.RL, tables.GENERATE, tables.SAMPLING, tables.PROFILER)
KEYS = [f"{place}.{key}" for place in PLACES for key in sorted(tables.known_keys(place))]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), junk=st.sampled_from([[], {}, "x", -1, 0, True, 1.5, ["a"]]))
def test_whatever_a_key_holds_nothing_but_an_error_with_a_fix_is_raised(load: Load, key: str, junk: object) -> None:
    with contextlib.suppress(ConfigError):
        load(with_keys({key: junk}))


def test_tables_name_only_keys_that_exist_here() -> None:
    rules = (*tables.TRAIN_RULES, *tables.RL_RULES, *tables.PPO_RULES, *tables.DPO_RULES)
    sections = {field.name: field.default_factory() for field in dataclasses.fields(Config)}
    settles = [neutral.instead for kind in tables.NEUTRAL.values() for neutral in kind.values() if neutral.instead]
    for key in [*(rule.ours for rule in rules), *settles]:
        section, *names = key.split(".")
        functools.reduce(getattr, names, sections[section])


@pytest.mark.parametrize("kind", ["role", tables.RL, tables.GENERATE, tables.SAMPLING])
def test_no_key_is_in_two_tables(kind: str) -> None:
    listed = [*tables.DERIVED[kind].split(), *tables.NEUTRAL[kind], *tables.NO_EFFECT[kind].split()]
    if kind == "role":
        listed += tables.ARCHITECTURE.split()
    assert len(listed) == len(set(listed))
