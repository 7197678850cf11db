"""A killed run goes on as if nothing had happened: whole runs through launch.py, real engines, two workers."""

import os
import shutil
import signal
import subprocess
import sys

import psutil
import pytest
from safetensors.torch import load_file

from tests.trainer.runs import ROOT, finished, tensors, untimed

LAYERS = 4
FILES = {"adapters.safetensors", "rank_00000.safetensors", "rank_00001.safetensors"}


def command(model, folder, *arguments):
    sizes = [
        "run.steps=4",
        "run.deterministic=true",
        "checkpoint.every=2",
        "checkpoint.keep=2",
        "checkpoint.export=false",
        "track.console=lines",
        "track.plot=false",
        "algorithm.prompts_per_step=4",
        "algorithm.samples_per_prompt=2",
        "algorithm.prompts_per_mini_batch=2",
        "algorithm.kl_coefficient=0.05",
        "algorithm.kl_target=0.5",
        "algorithm.kl_horizon=64",
        "rollout.max_response_tokens=8",
        "noise.stages=2",
        "reward.function=tests.trainer.reward_functions.share_of_digits",
    ]
    base = [sys.executable, "launch.py", "--config", "configs/quickstart_cpu.yaml"]
    return [*base, f"model.path={model}", f"run.output_dir={folder}", *sizes, *arguments]


def environment(folder):
    return os.environ | {"QERL_TEST_RUN": str(folder)}


def launch(model, folder, *arguments):
    """The console of a run that ends well."""
    return finished(command(model, folder, *arguments), environment(folder))


def of_run(folder):
    """The processes of a run, by its marker variable."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("QERL_TEST_RUN") == str(folder):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return found


def launch_and_kill(model, folder, step):
    """A run whose processes are all killed once the checkpoint of `step` is complete and a later step is under way."""
    process = subprocess.Popen(
        command(model, folder), cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    printed = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"step {step + 1}/"):
                break
        assert (folder / "checkpoints" / f"step_{step:08d}" / "meta.json").is_file(), "".join(printed)
    finally:
        doomed = of_run(folder)
        for one in doomed:
            one.send_signal(signal.SIGKILL)
        process.communicate()
        psutil.wait_procs(doomed, timeout=20)


@pytest.fixture(scope="module")
def model(tiny_w8a8):
    """A model with shared experts, whose adapters train too; other families resume in test_ppo and test_rollouts."""
    return tiny_w8a8("qwen2_moe")


@pytest.fixture(scope="module")
def straight(model, tmp_path_factory):
    """Four steps without a break."""
    folder = tmp_path_factory.mktemp("straight")
    launch(model, folder)
    return folder


def test_a_killed_run_resumes_bit_for_bit(straight, model, tmp_path):
    """Its first steps, before the kill, are those of the same launch once more."""
    launch_and_kill(model, tmp_path, step=2)
    assert [row["step"] for row in untimed(tmp_path / "metrics.jsonl")][:3] == [1, 2, 3]
    # What a kill in the middle of writing the next checkpoint leaves.
    torn = tmp_path / "checkpoints" / "step_00000004"
    torn.mkdir(exist_ok=True)
    (torn / "rank_00000.safetensors.tmp").write_bytes(b"half")
    (torn / "meta.json").unlink(missing_ok=True)
    # The model may have moved: what counts is what it holds.
    moved = shutil.copytree(model, tmp_path / "model")
    printed = launch(moved, tmp_path, "--resume", "auto")
    assert "resume: after step 2" in printed
    assert "step 3/4" in printed
    assert "step 1/4" not in printed
    assert [row["step"] for row in untimed(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert untimed(tmp_path / name) == untimed(straight / name)
    assert [row["step"] for row in untimed(tmp_path / "swaps.jsonl")] == [
        step for step in (1, 2, 3, 4) for _ in range(4)
    ]
    for step in (2, 4):
        found, expected = tensors(tmp_path, step), tensors(straight, step)
        assert found.keys() == expected.keys()
        assert {name.partition("/")[0] for name in found} == FILES
        for name, tensor in expected.items():
            assert found[name].equal(tensor), name
        # Of every layer's shared expert, two adapters of two matrices: trained, and with the moments of their updates.
        moments = [name for name in found if ".shared_experts." in name and name.endswith("/exp_avg_sq")]
        assert len({name.partition("/optimizer/")[2] for name in moments}) == 4 * LAYERS
        assert all(found[name].any() for name in moments)
    assert not (torn / "rank_00000.safetensors.tmp").exists()


def test_another_train_layout_takes_the_weights_along_and_says_what_differs(straight, model, tmp_path):
    source = straight / "checkpoints" / "step_00000002"
    layout = ["train.expert_parallel=1", "train.tensor_parallel=2", "train.learning_rate=0"]
    printed = launch(model, tmp_path, "--resume", str(source), *layout)
    assert "train.expert_parallel 2 -> 1" in printed
    assert "the random states differ" in printed
    assert "train.learning_rate 0.001 -> 0.0" in printed
    # With a learning rate of 0 the weights stay as they were loaded.
    before = load_file(source / "adapters.safetensors")
    after = load_file(tmp_path / "checkpoints" / "step_00000004" / "adapters.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    for part in ("", "shared_expert."):
        assert any(before[name].any() for name in before if part in name and name.endswith("lora_B"))
    # The rollout engine got those very weights, and the prompts that came next.
    samples = untimed(tmp_path / "samples.jsonl")
    assert {row["step"] for row in samples} == {3, 4}
    third, expected = (
        [row for row in found if row["step"] == 3] for found in (samples, untimed(straight / "samples.jsonl"))
    )
    assert third == expected
