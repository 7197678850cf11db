"""Which checkpoint --resume takes, and which changes to the launch file it refuses or names, before any process."""

import json
import shutil
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

import launch
from qerl_rl.config.loader import load_config
from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.train import checkpoint
from trainer.grpo import GrpoTrainer
from trainer.preflight import preflight
from trainer.resume import run_state
from trainer.run import start_lines
from transfer_dock import SampleKey

PLACES = ["cluster.workers=4", "rollout.data_parallel=4"]


@pytest.fixture
def run_folder(tmp_path, tiny_w8a8):
    """A launch file, and checkpoints of steps 2 and 4 of its run as far as the driver reads them."""
    model = shutil.copytree(tiny_w8a8("qwen3_moe"), tmp_path / "model")
    (tmp_path / "launch.yaml").write_text(
        f"run: {{steps: 6, output_dir: {tmp_path}/run}}\n"
        f"model: {{path: {model}, max_length: 64}}\n"
        "rollout: {max_prompt_tokens: 24, max_response_tokens: 16}\n"
        "eval: {every: 2, prompts: 4}\n"
        "data: {train_path: arithmetic}\n"
    )
    plan = preflight(load_config(tmp_path / "launch.yaml"))
    for step in (2, 4):
        plan.prompts.next(32)
        write_checkpoint(tmp_path / "run" / "checkpoints", step, state_of(plan))
    return tmp_path


def state_of(plan):
    model = fingerprint(plan.config.model.path)
    return run_state(
        plan.config,
        model=model,
        prompts=plan.prompts.state(),
        prompts_needed=plan.prompts_needed,
        algorithm={"kl_coefficient": plan.config.algorithm.kl_coefficient},
    )


def write_checkpoint(folder, step, state, keep=9):
    checkpoint.begin(folder, step)
    checkpoint.write_rank(folder, step, 0, {"a": torch.arange(3)}, {"b": torch.ones(2)})
    checkpoint.finish(folder, step, {"run": state}, keep)


def resumed(folder, choice, *overrides):
    return preflight(load_config(folder / "launch.yaml", overrides), str(choice))


def refusal(folder, capsys, choice, *overrides):
    assert launch.main(["--config", str(folder / "launch.yaml"), "--resume", str(choice), *overrides]) == 2
    message = capsys.readouterr().err
    assert message.startswith("config error: ")
    assert message.count("\n") == 1
    assert not ray.is_initialized()
    return message


def test_auto_takes_the_newest_and_gives_the_prompts_that_come_next(run_folder):
    plan = resumed(run_folder, "auto")
    assert (plan.resume.step, plan.first_step, plan.resume.remarks) == (4, 5, ())
    straight = resumed(run_folder, "never")
    assert straight.first_step == 1
    given = straight.prompts.next(80)
    assert [prompt.text for prompt in plan.prompts.next(16)] == [prompt.text for prompt in given[64:]]


def test_never_is_the_default_and_auto_without_a_checkpoint_starts_anew_and_says_so(run_folder):
    assert preflight(load_config(run_folder / "launch.yaml")).resume is None
    plan = resumed(run_folder, "auto", f"run.output_dir={run_folder}/empty")
    assert plan.resume is None
    assert start_lines(plan) == [f"resume: a fresh start, {run_folder}/empty/checkpoints holds no complete checkpoint"]


@pytest.mark.parametrize(("path", "step"), [("run", 4), ("run/checkpoints", 4), ("run/checkpoints/step_00000002", 2)])
def test_a_path_may_be_a_run_its_checkpoints_or_one_of_them(run_folder, path, step):
    plan = resumed(run_folder, run_folder / path, f"run.output_dir={run_folder}/other")
    assert plan.resume.step == step


def test_half_written_checkpoints_are_ignored_and_removed(run_folder):
    folder = run_folder / "run" / "checkpoints"
    (folder / "step_00000004" / "meta.json").unlink()
    (folder / "step_00000006").mkdir()
    (folder / "step_00000006" / "meta.json.tmp").write_text("{")
    plan = resumed(run_folder, "auto")
    assert plan.resume.step == 2
    assert checkpoint.tidy(folder, plan.resume.step) == []
    assert [path.name for path in folder.iterdir()] == ["step_00000002"]


def test_checkpoints_that_the_run_does_not_go_on_from_move_aside(run_folder):
    folder = run_folder / "run" / "checkpoints"
    plan = resumed(run_folder, folder / "step_00000002")
    assert f"checkpoints of other steps (4) move to {folder}.old" in start_lines(plan)
    assert checkpoint.tidy(folder, 2) == [4]
    assert checkpoint.complete_steps(folder) == [2]
    assert checkpoint.complete_steps(f"{folder}.old") == [4]
    # A fresh start takes nothing, and what was moved before gives way only to a checkpoint of the same step.
    assert checkpoint.tidy(folder, 0) == [2]
    assert checkpoint.complete_steps(f"{folder}.old") == [2, 4]


def test_the_newest_checkpoints_stay_and_the_last_one_until_the_next_counts(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, {}, keep=1)
    seen = []
    write = checkpoint.write_durably

    def watched(path, fill):
        seen.append(checkpoint.complete_steps(tmp_path))
        write(path, fill)

    monkeypatch.setattr(checkpoint, "write_durably", watched)
    write_checkpoint(tmp_path, 2, {}, keep=1)
    assert seen == [[1]] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_rank_that_writes_nothing_is_named_and_the_checkpoint_never_counts(tmp_path):
    checkpoint.begin(tmp_path, 3)
    checkpoint.write_rank(tmp_path, 3, 0, {"a": torch.arange(3)}, {})
    with pytest.raises(checkpoint.CheckpointError, match="rank_00001"):
        checkpoint.wait_for_ranks(tmp_path, 3, ranks=2, timeout_s=0.0)
    assert checkpoint.complete_steps(tmp_path) == []


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("lora.rank=4", "set lora.rank back to 16"),
        ("run.seed=7", "set run.seed back to 1"),
        ("data.shuffle=false", "set data.shuffle back to True"),
        ("eval.prompts=3", "set eval.every, eval.path and eval.prompts back"),
        ("run.steps=3", "set run.steps to 4 or more"),
        ("rollout.carry_prompts=2", "set rollout.carry_prompts back to 0"),
        ("rollout.ahead=true", "set rollout.ahead back to False"),
    ],
)
def test_changed_keys_that_make_another_run_are_refused_by_name(run_folder, capsys, override, fix):
    message = refusal(run_folder, capsys, "auto", override)
    assert override.partition("=")[0] in message
    assert fix in message
    assert "(command line)" in message


def test_where_every_weight_trains_the_layout_stays(run_folder, tiny_checkpoint, capsys):
    whole = ["lora.rank=0", f"model.path={tiny_checkpoint('qwen3_moe')}", f"run.output_dir={run_folder}/whole"]
    plan = resumed(run_folder, "never", *whole)
    write_checkpoint(run_folder / "whole" / "checkpoints", 4, state_of(plan))
    assert resumed(run_folder, "auto", *whole).resume.step == 4
    for key, then, now in (("train.expert_parallel", 1, 2), ("train.dtype", "float32", "bfloat16")):
        message = refusal(run_folder, capsys, "auto", *whole, f"{key}={now}")
        assert f"{key}={now}, but the checkpoint" in message
        assert f"set {key} back to {then}" in message


@pytest.mark.parametrize(
    "key", ["algorithm.samples_per_prompt", "algorithm.prompts_per_step", "rollout.max_response_tokens"]
)
def test_samples_that_wait_hold_on_to_the_sizes_they_were_drawn_for(run_folder, capsys, key):
    changed = {"algorithm.samples_per_prompt": 4, "algorithm.prompts_per_step": 32, "rollout.max_response_tokens": 15}
    override = f"{key}={changed[key]}"
    assert f"{key} " in resumed(run_folder, "auto", override).resume.remarks[0]
    (run_folder / "run" / "checkpoints" / "step_00000004" / "dock").write_bytes(b"samples")
    assert f"set {key} back to" in refusal(run_folder, capsys, "auto", override)


def test_another_model_at_the_same_path_is_refused(run_folder, capsys):
    file = run_folder / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert "model.path" in refusal(run_folder, capsys, "auto")


def test_a_moved_model_and_more_steps_are_accepted(run_folder):
    overrides = [f"model.path={run_folder}/elsewhere", "run.steps=40", "checkpoint.keep=5", "track.plot=false"]
    as_planned = [prompt.text for prompt in resumed(run_folder, "auto").prompts.next(32)]
    shutil.move(run_folder / "model", run_folder / "elsewhere")
    plan = resumed(run_folder, "auto", *overrides)
    assert plan.resume.remarks == ()
    # The generated data is that of the six steps the run was planned for: the order of prompts stays.
    assert [prompt.text for prompt in plan.prompts.next(32)] == as_planned
    # A second resume still knows.
    assert state_of(plan)["prompts_needed"] == 6 * 16 + 4


def test_what_will_differ_from_an_uninterrupted_run_is_said(run_folder):
    layout = [*PLACES, "train.expert_parallel=2", "train.learning_rate=0.5", "noise.enabled=true", "run.steps=8"]
    remarks = "\n".join(resumed(run_folder, "auto", *layout).resume.remarks)
    assert "cluster.workers 2 -> 4, train.expert_parallel 1 -> 2" in remarks
    assert "the random states differ" in remarks
    assert "run.steps 6 -> 8" in remarks
    assert "train.learning_rate 0.0001 -> 0.5" in remarks
    assert "rollout.data_parallel 2 -> 4" in remarks


@pytest.mark.parametrize("path", ["nowhere", "model"])
def test_a_path_without_a_checkpoint_is_refused(run_folder, capsys, path):
    assert f"--resume {run_folder / path}" in refusal(run_folder, capsys, run_folder / path)


def test_a_broken_meta_names_its_file(run_folder, capsys):
    meta = Path(run_folder, "run", "checkpoints", "step_00000004", "meta.json")
    meta.write_text(meta.read_text()[:-20])
    assert str(meta) in refusal(run_folder, capsys, "auto")


def test_the_dry_run_says_where_it_would_start(run_folder, capsys):
    assert launch.main(["--config", str(run_folder / "launch.yaml"), "--dry-run", "--resume", "auto"]) == 0
    assert "after step 4 of" in capsys.readouterr().out


@pytest.fixture
def running_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def test_samples_that_were_left_in_the_dock_come_back(run_folder, running_ray):
    file = run_folder / "run" / "checkpoints" / "step_00000004" / "dock"
    plan = resumed(run_folder, "auto")
    trainer = GrpoTrainer(plan, None, None)
    trainer.rollouts.put_prompts(5, 0, plan.config.algorithm.prompts_per_step)
    trainer._save_dock(file)
    trainer.dock.close()
    given = resumed(run_folder, "auto").prompts.next(16)
    other = GrpoTrainer(resumed(run_folder, "auto"), None, None)
    size = plan.config.algorithm.samples_per_prompt
    batch = other.dock.get("rollout", 16 * size, whole_groups=True, step=5)
    found = {key: row.tolist() for key, row in zip(batch.keys, batch.columns["prompts"].rows(), strict=True)}
    assert found == {
        SampleKey(5, group, index): prompt.tokens.tolist()
        for group, prompt in enumerate(given)
        for index in range(size)
    }
    # A dock without samples leaves no file, and takes an older one away.
    other.dock.ack(batch)
    other.dock.close_step(5, carry_unfinished=False)
    other._save_dock(file)
    assert not file.exists()
    other.dock.close()


def test_a_fingerprint_is_of_the_content(run_folder):
    model, copy = run_folder / "model", run_folder / "copy"
    shutil.copytree(model, copy)
    assert fingerprint(copy) == fingerprint(model)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.5}))
    assert fingerprint(copy) != fingerprint(model)
