"""Wrong input ends launch.py with one line that names the fix, exit code 2, before any process starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import launch

ROOT = Path(__file__).parents[2]
DPO = "algorithm.name=dpo algorithm.samples_per_prompt=2"


@pytest.fixture(scope="module")
def launch_file(tmp_path_factory, tiny_w8a8):
    folder = tmp_path_factory.mktemp("launch")
    path = folder / "launch.yaml"
    path.write_text(
        f"run: {{steps: 2, output_dir: {folder}/run}}\n"
        f"model: {{path: {tiny_w8a8('qwen3_moe')}, max_length: 64}}\n"
        "rollout: {max_prompt_tokens: 24, max_response_tokens: 16}\n"
        "data:\n"
        "  train_path: arithmetic\n"
    )
    return path


def rows(folder, lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_valid_file_passes_the_dry_run(launch_file, capsys):
    assert launch.main(["--config", str(launch_file), "--dry-run", "rollout.max_sequences=7"]) == 0
    printed = capsys.readouterr().out
    assert "max_sequences: 7" in printed
    assert "samples a step" in printed
    assert not ray.is_initialized()


def test_fused_experts_pass_the_dry_run_and_unclear_ones_do_not(launch_file, tiny_checkpoint, tiny_fused, capsys):
    rows = tiny_fused(tiny_checkpoint("qwen3_moe"))
    call = ["--config", str(launch_file), "--dry-run", "quant.format=none", "lora.experts=false"]
    assert launch.main([*call, f"model.path={rows}"]) == 0
    assert "samples a step" in capsys.readouterr().out
    # Its gate_up_proj are square.
    assert launch.main([*call, f"model.path={tiny_fused(tiny_checkpoint('qwen3_moe'), columns=True)}"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "gate and up can't be told" in told
    assert "save_original_format=True" in told


def test_the_dry_run_of_dpo_names_no_rollout_unless_it_evaluates(launch_file, capsys):
    for evaluation, shown in (("eval.every=0", False), ("eval.every=1", True)):
        # Without a rollout, its layout is of no interest.
        layout = [] if shown else ["rollout.data_parallel=5"]
        arguments = ["--config", str(launch_file), "--dry-run", *DPO.split(), evaluation, "eval.prompts=2", *layout]
        assert launch.main(arguments) == 0
        assert ("rollout ranks" in capsys.readouterr().out) == shown


@pytest.mark.parametrize(
    ("override", "problem", "fix"),
    [
        (
            "run.deterministic=true train.device=npu cluster.environment.HCCL_DETERMINISTIC=false",
            "cluster.environment.HCCL_DETERMINISTIC=False",
            "take HCCL_DETERMINISTIC out of cluster.environment (it becomes true)",
        ),
        ("rollout.max_respons_tokens=3", "unknown key rollout.max_respons_tokens", "rollout.max_response_tokens"),
        ("model.path=/no/such/model", "/no/such/model", "model.path"),
        ("quant.format=none lora.experts=false", "quant.format=none", "set quant.format to w8a8"),
        ("rollout.tensor_parallel=3", "rollout.tensor_parallel=3", "divisor of 2"),
        ("data.train_path=/no/such.jsonl", "/no/such.jsonl", "data.train_path"),
        ("reward.function=mth", "mth", "math"),
        ("algorithm.advantage=reinforce_plusplus", "algorithm.advantage=reinforce_plusplus", "to reinforce_plus_plus,"),
        ("algorithm.loss=gpso", "algorithm.loss=gpso is unknown", "set algorithm.loss to gspo"),
        ("algorithm.loss=no_module.loss", "there is no module no_module", "PYTHONPATH"),
        ("algorithm.loss=qerl_rl.algorithms.losses.clipped_los", "has no function clipped_los", "clipped_value_loss"),
        ("algorithm.advantage=qerl_rl.config.loader.to_yaml", "called with (outcome, config)", "let it take these"),
        ("algorithm.kl_estimator=full", "the sampled tokens only", "set algorithm.kl_estimator to k3"),
        ("algorithm.kl_in=rewards", "algorithm.kl_in=rewards", "loss or reward"),
        ("algorithm.kl_target=0.1", "algorithm.kl_target=0.1", "set algorithm.kl_coefficient above 0"),
        ("algorithm.dual_clip=1.1", "algorithm.dual_clip=1.1", "set algorithm.dual_clip to"),
        ("algorithm.overlong_buffer_tokens=17", "rollout.max_response_tokens=16", "to 16 or less"),
        ("algorithm.loss_aggregation=mean", "algorithm.loss_aggregation=mean", "sequence_sum_constant"),
        ("reward.functions.fromat=1", "fromat", "format"),
        ("data.prompt_template='{prompt}-{question}'", "no field 'question'", "data.prompt_template"),
        ("data.train_path=/no/such.parquet", "/no/such.parquet", "data.train_path"),
        ("data.train_path=no_module.rows", "no module no_module", "PYTHONPATH"),
        ("reward_model.path=/no/such/model", "/no/such/model holds no config.json", "set reward_model.path"),
        ("reward_model.backend=vllm", "reward_model.backend=vllm is unknown", "hf or megatron"),
        ("reward_model.weight=.inf", "reward_model.weight=inf", "finite"),
        ("reward.functions.exact=0", "every weight in reward.functions is 0", "or give a reward model"),
        ("algorithm.name=dpo", "algorithm.samples_per_prompt=8", "set algorithm.samples_per_prompt to 2"),
        (f"{DPO} dpo.loss=simpo", "dpo.loss=simpo is unknown", "dpo or ipo or cdpo"),
        (f"{DPO} dpo.beta=0", "dpo.beta=0.0 is not positive", "set dpo.beta above 0"),
        (f"{DPO} dpo.flip_probability=0.5", "dpo.flip_probability=0.5", "below 0.5"),
        ("lora.rank=-1", "lora.rank=-1 is too small", "set lora.rank to 0 or more"),
        ("lora.rank=0", "lora.rank=0 trains every weight", "checkpoint in bfloat16 or float32, or lora.rank above 0"),
        (f"{DPO} lora.rank=0", "lora.rank=0 trains every weight", "set model.path to the checkpoint in bfloat16"),
        ("lora.rank=0 lora.in_rollout=merge", "lora.in_rollout=merge, but", "set lora.in_rollout to auto"),
        ("lora.rank=0 lora.merge_rounding=nearest", "lora.merge_rounding=nearest, but", "rounding to stochastic"),
        ("quant.group_size=32", "the checkpoint says which groups it has", "set quant.group_size to 0"),
        (
            "lora.rank=0 quant.format=none quant.group_size=32",
            "quant.format=none has no scales",
            "quant.group_size to 0",
        ),
        (f"{DPO} rollout.temperature=0.7", "rollout.temperature=0.7", "set rollout.temperature to 1"),
        (f"{DPO} algorithm.kl_coefficient=0.1", "algorithm.kl_coefficient=0.1", "dpo.beta"),
        (f"{DPO} noise.enabled=true", "noise.enabled=true", "set noise.enabled to false"),
        (f"{DPO} algorithm.prompts_per_mini_batch=1", "1 pairs do not divide", "to a multiple of 2"),
        (f"{DPO} rollout.max_response_tokens=2", "longer response of this pair has", "rollout.max_response_tokens to"),
        (f"{DPO} data.chosen_field=good", "no field 'good' (data.chosen_field)", "set data.chosen_field to"),
    ],
)
def test_wrong_keys_are_answered_with_the_fix(launch_file, capsys, override, problem, fix):
    assert launch.main(["--config", str(launch_file), *override.split()]) == 2
    message = capsys.readouterr().err
    assert message.startswith("config error: ")
    assert problem in message
    assert fix in message
    assert message.count("\n") == 1
    assert not ray.is_initialized()


def test_the_dry_run_counts_the_prompts_it_leaves_out(launch_file, tmp_path, capsys):
    data = rows(tmp_path, [{"prompt": "1+" * length, "answer": "2"} for length in (1, 1, 20, 1, 30)])
    sizes = ["algorithm.prompts_per_step=2", "algorithm.prompts_per_mini_batch=2", "data.max_prompt_tokens=20"]
    assert launch.main(["--config", str(launch_file), "--dry-run", f"data.train_path={data}", *sizes]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "prompts to train on 3 (0 held out)" in printed
    assert "prompts left out 2 (longer than data.max_prompt_tokens=20)" in printed


def test_layouts_that_do_not_divide_the_model_name_what_they_split(launch_file, capsys):
    wide = ["cluster.workers=4", "train.tensor_parallel=4", "rollout.data_parallel=4"]
    assert launch.main(["--config", str(launch_file), *wide]) == 2
    message = capsys.readouterr().err
    assert "train.tensor_parallel" in message
    assert "2 key-value heads" in message
    assert "set train.tensor_parallel to 1" in message
    assert "command line" in message


def test_a_layout_that_cuts_weights_of_one_scale_apart_names_the_group(
    launch_file, tiny_checkpoint, tiny_quantized, capsys
):
    folder = tiny_quantized(tiny_checkpoint("qwen3_moe"), "w4a16", group_size=64)
    layout = ["cluster.workers=2", "train.tensor_parallel=2", "train.expert_tensor_parallel=2"]
    model = [f"model.path={folder}", "quant.format=w4a16"]
    assert launch.main(["--config", str(launch_file), *model, *layout]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "train.expert_tensor_parallel=2 cuts the 64 columns" in message
    assert "w4a16 in groups of 64" in message
    assert "set train.expert_tensor_parallel to 1" in message
    assert "command line" in message


@pytest.mark.parametrize(
    ("overrides", "problem", "fix"),
    [
        ("quant.format=w8a8", "", ""),
        ("quant.format=none", "", ""),
        (
            "quant.format=w4a16 quant.group_size=64 rollout.tensor_parallel=2 rollout.data_parallel=1 "
            "rollout.expert_parallel=false",
            "rollout.tensor_parallel=2 does not divide dimension 2 of model.layers.0.mlp.experts.w2_scale",
            "set rollout.tensor_parallel to 1, or set rollout.expert_parallel to true",
        ),
        ("quant.format=w4a16 quant.group_size=32", "", ""),
        (f"{DPO} quant.format=w4a16", "", ""),
        ("quant.format=w4a16", "rows of 64 weights can't be cut", "set quant.group_size smaller"),
        ("quant.format=w8a8 quant.group_size=32", "w8a8 has no groups of 32", "set the group size to -1"),
        (
            "quant.format=w4a16 quant.group_size=64 train.tensor_parallel=2 train.expert_tensor_parallel=2",
            "train.expert_tensor_parallel=2 cuts the 64 columns",
            "set train.expert_tensor_parallel to 1, or set quant.group_size smaller",
        ),
    ],
)
def test_what_trains_whole_must_fit_the_groups_of_the_engines_format(
    launch_file, tiny_checkpoint, capsys, overrides, problem, fix
):
    """A float checkpoint does; dpo without evaluations has no engine."""
    model = f"model.path={tiny_checkpoint('qwen3_moe')}"
    arguments = ["--config", str(launch_file), "--dry-run", model, "lora.rank=0", *overrides.split()]
    assert launch.main(arguments) == (2 if problem else 0)
    message = " ".join(capsys.readouterr().err.split())
    assert problem in message
    assert fix in message


def test_a_prompt_over_the_limit_names_its_line(launch_file, tmp_path, capsys):
    data = rows(tmp_path, [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+" * 40, "answer": "2"}])
    assert launch.main(["--config", str(launch_file), f"data.train_path={data}"]) == 2
    message = capsys.readouterr().err
    assert f"{data}:2" in message
    assert "rollout.max_prompt_tokens" in message


def test_a_line_without_the_prompt_field_names_the_fields_it_has(launch_file, tmp_path, capsys):
    data = rows(tmp_path, [{"prompt": "1+1=", "answer": "2"}, {"promt": "2+2=", "answer": "4"}])
    assert launch.main(["--config", str(launch_file), f"data.train_path={data}"]) == 2
    message = capsys.readouterr().err
    assert f"{data}:2" in message
    assert "promt" in message


def test_the_command_exits_with_two_and_one_line(launch_file):
    command = [sys.executable, "launch.py", "--config", str(launch_file), "trian.dtype=float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("config error: unknown key trian.")
    assert done.stderr.count("\n") == 1
