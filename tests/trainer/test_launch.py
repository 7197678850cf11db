"""Whole runs through launch.py: real Ray, real vLLM, real Megatron, two workers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.shared_memory import dock_files
from tests.trainer.runs import finished

ROOT = Path(__file__).parents[2]
REQUIRED = {
    "step", "reward/mean", "reward/std", "entropy", "kl/reference", "rollout_vs_train/kl", "rollout_vs_train/k3_kl",
    "rollout_vs_train/prob_diff_mean", "rollout_vs_train/prob_diff_max", "rollout_vs_train/pearson",
    "rollout_vs_train/ess", "rollout_vs_train/ppl_ratio", "time/rollout_s", "time/swap_s",
    "time/reward_s", "time/log_probs_s", "time/update_s", "time/total_s", "tokens_per_s/rollout", "tokens_per_s/train",
    "memory/peak_bytes",
}  # fmt: skip

LAYOUTS = {
    "train-ep2-rollout-dp2ep2": ["train.expert_parallel=2", "rollout.data_parallel=2"],
    "train-tp2ep2-rollout-tp2": [
        "train.tensor_parallel=2",
        "train.expert_parallel=2",
        "rollout.tensor_parallel=2",
        "rollout.data_parallel=1",
        "reward.function=",
        "reward.functions={format: 0.5, tests.trainer.reward_functions.many_digits: 2.0, math: 0.0}",
        "eval.samples=3",
        "eval.correct_at=0.5",
    ],
}
# What the second layout learns with instead of the launch file's GRPO.
ALGORITHMS = {
    "train-ep2-rollout-dp2ep2": [],
    "train-tp2ep2-rollout-tp2": [
        "algorithm.advantage=reinforce_plus_plus",
        "algorithm.loss=gspo",
        "algorithm.loss_aggregation=sequence_sum_constant",
        "algorithm.kl_in=reward",
        "algorithm.kl_estimator=k2",
        "algorithm.kl_coefficient=0.1",
        "algorithm.kl_target=0.5",
        "algorithm.kl_horizon=64",
        "algorithm.overlong_buffer_tokens=4",
        "noise.log_probs=noisy",
        "noise.exempt_router=true",
        "algorithm.name=dapo",
        "algorithm.sampling_rounds=2",
        "router_replay.mode=R3",
    ],
}
# profiler.*, and what that records: stages and ranks of the second step.
PROFILED = {
    "train-ep2-rollout-dp2ep2": (
        ["steps=[2]", "stages=[all]", "ranks=[1]"],
        {"swap_to_rollout", "rollout", "swap_to_train", "old_log_probs", "reference_log_probs", "update"},
        {1},
    ),
    "train-tp2ep2-rollout-tp2": (
        ["steps=[2]", "stages=[update,reference_log_probs]", "ranks=[0,1]", "shapes=true", "memory=true"],
        {"reference_log_probs", "update"},
        {0, 1},
    ),
}
EVALUATION = {
    "train-ep2-rollout-dp2ep2": {"pass@1"},
    "train-tp2ep2-rollout-tp2": {"avg@3", "maj@3", "pass@1", "pass@2", "pass@3"},
}


def command(model, folder, *overrides):
    sizes = [
        "run.steps=2",
        "algorithm.prompts_per_step=8",
        "algorithm.samples_per_prompt=4",
        "algorithm.prompts_per_mini_batch=4",
        "noise.stages=2",
        "eval.every=2",
        "eval.prompts=5",
        "reward.function=tests.trainer.reward_functions.share_of_digits",
    ]
    base = [sys.executable, "launch.py", "--config", "configs/quickstart_cpu.yaml"]
    return [*base, f"model.path={model}", f"run.output_dir={folder}", *sizes, *overrides]


def descendants_of_ray(folder):
    """Processes that a run below `folder` could have left: Ray's own and its workers, by the run's marker variable."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("QERL_TEST_RUN") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return left


def environment(folder):
    return os.environ | {"QERL_TEST_RUN": str(folder)}


def assert_no_process_is_left(folder):
    _, alive = psutil.wait_procs(descendants_of_ray(folder), timeout=20)
    assert not alive, [" ".join(process.cmdline())[:120] for process in alive]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_run_and_leave_what_the_readme_names(tmp_path, tiny_w8a8, layout):
    model = tiny_w8a8("qwen3_moe")
    profiler = [f"profiler.{key}" for key in PROFILED[layout][0]]
    arguments = *LAYOUTS[layout], *ALGORITHMS[layout], *profiler
    printed = finished(command(model, tmp_path, *arguments), environment(tmp_path))
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert set(step) >= REQUIRED
        assert all(isinstance(step[key], int | float) and math.isfinite(step[key]) for key in REQUIRED)
        assert step["tokens_per_s/rollout"] > 0
    # The first log-probs are of the untrained policy, which is the reference; training then moves away from it.
    assert steps[0]["grad_norm"] > 0
    assert steps[1]["kl/reference"] > 0
    assert_rewards(steps, layout)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "response", "reward"} <= set(samples[0])
    for name in ["reward.png", "config.yaml", "checkpoints", "export/adapter"]:
        assert (tmp_path / name).exists(), name
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert "reward" in printed
    if "algorithm.kl_in=reward" in ALGORITHMS[layout]:
        # No KL yet: the controller lets go by 20 % x 32 samples / 64. Nearly all responses reach their limit.
        assert [step["kl/coefficient"] for step in steps] == pytest.approx([0.1, 0.09])
        assert steps[1]["reward/overlong_mean"] < -0.5
        assert steps[1]["reward/kl_mean"] != 0
        # The second half of the run has noise, which the trainer knows.
        assert [step["noise/sigma"] for step in steps] == [0.0, 1e-2]
        assert steps[1]["noise/kl"] > 0
        assert "noise/kl" not in steps[0]
        assert [step["router_replay/missing"] for step in steps] == [0.0, 0.0]
        assert all(0.0 < step["router_replay/changed"] < 0.2 for step in steps)
        # Some groups earn the same throughout; new prompts take their place once.
        assert all(8 < step["sampling/groups"] <= 16 for step in steps)
        assert all(step["reward/mean"] >= step["sampling/reward_mean"] for step in steps)
    else:
        assert not [name for name in steps[0] if name.startswith("router_replay/")]
    assert_traces(tmp_path / "profile", *PROFILED[layout][1:])
    assert_ledger(tmp_path)
    assert_export_loads(tmp_path)
    assert_no_process_is_left(tmp_path)


def assert_rewards(steps, layout):
    """Each function's mean is there, the reward is their weighted sum, and step 2 evaluates."""
    functions = "reward/tests.trainer.reward_functions"
    for step in steps:
        if EVALUATION[layout] == {"pass@1"}:
            assert step["reward/mean"] == pytest.approx(step[f"{functions}.share_of_digits"], abs=1e-5)
        else:
            expected = 0.5 * step["reward/format"] + 2.0 * step[f"{functions}.many_digits"]
            # Of all that was sampled, also of groups that were not learned from.
            assert step["sampling/reward_mean"] == pytest.approx(expected, abs=1e-5)
            assert step["reward/math"] >= 0.0
        assert step["data/epochs"] > 0
    measured = {name for name in steps[1] if name.startswith("eval/")}
    assert measured == {f"eval/{name}" for name in EVALUATION[layout] | {"reward_mean", "failures"}}
    assert all(0.0 <= steps[1][f"eval/{name}"] <= 1.0 for name in EVALUATION[layout])
    assert not [name for name in steps[0] if name.startswith("eval/")]


def assert_traces(folder, stages, ranks):
    """Each stage of the second step on each rank has a trace of its own, of no other stage, and nothing else has."""
    assert {path.name for path in folder.iterdir()} == {
        f"step_00000002_{stage}_rank_{rank:05d}.json" for stage in stages for rank in ranks
    }
    for stage in stages:
        for rank in ranks:
            events = json.loads((folder / f"step_00000002_{stage}_rank_{rank:05d}.json").read_text())["traceEvents"]
            names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
            assert [name for name in names if " of step " in name] == [f"{stage} of step 2"]
            # An update leaves gradients, the forward passes alone leave none.
            backward = any("Backward" in event["name"] for event in events if event.get("cat") == "cpu_op")
            assert backward == (stage == "update"), stage


def assert_ledger(folder):
    """Train state is out of memory in the rollout phase, the KV cache in the train phase, on both ranks, each step."""
    rows = [json.loads(line) for line in (folder / "swaps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rank"], row["phase"]) for row in rows[:4]] == [
        (1, 0, "rollout"), (1, 1, "rollout"), (1, 0, "train"), (1, 1, "train"),
    ]  # fmt: skip
    for row in rows:
        held = row["held_bytes"]
        if row["phase"] == "rollout":
            assert held["train/parameters"] == held["train/optimizer"] == held["train/gradients"] == 0
            assert row["moved_bytes"] > 0
            assert held["rollout/kv_cache"] > 0
        else:
            assert held["rollout/kv_cache"] == 0
            assert held["train/parameters"] > 0


def assert_export_loads(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "export" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export" / "hf")
    logits = model(**tokenizer("12+34=", return_tensors="pt", return_token_type_ids=False)).logits
    assert torch.isfinite(logits).all()


@contextmanager
def running(model, folder, *overrides):
    """A run in a process group of its own, as a shell starts it, past its first step."""
    process = subprocess.Popen(
        command(model, folder, "run.steps=1000", "track.console=lines", *overrides),
        cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        # A shell lets what it starts in the background, this suite for one, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert any(re.match(r"step +1/1000  reward", line) for line in process.stdout), process.communicate()
        assert dock_files(process.pid), "what must be gone when it has ended"
        yield process
    finally:
        process.kill()


def press_ctrl_c(process):
    """A terminal signals the whole group."""
    os.killpg(process.pid, signal.SIGINT)


@pytest.mark.parametrize("stop", [press_ctrl_c, subprocess.Popen.terminate], ids=["ctrl-c", "terminate"])
def test_an_interrupted_run_stops_every_process(tmp_path, tiny_w8a8, stop):
    with running(tiny_w8a8("qwen3_moe"), tmp_path) as process:
        assert len(descendants_of_ray(tmp_path)) > 3
        stop(process)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert errors.strip() == "interrupted: every process of the run was stopped."
    assert_no_process_is_left(tmp_path)
    assert dock_files(process.pid) == []


def test_a_worker_that_dies_ends_the_run_with_its_name(tmp_path, tiny_w8a8):
    with running(tiny_w8a8("qwen3_moe"), tmp_path) as process:
        workers = [p for p in descendants_of_ray(tmp_path) if "ActorHybridWorker" in " ".join(p.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        output, errors = process.communicate(timeout=90)
    assert process.returncode == 1, output + errors
    assert "run failed: worker" in errors
    assert "Traceback" not in errors
    assert_no_process_is_left(tmp_path)
    assert dock_files(process.pid) == []
