"""A quickstart step by launch.py with its trainer on simulated NPUs and its engine on CPU: that of a CPU run.

Not proven here: numerics of the kernels, NZ formats, limits of kernels, speed, vllm-ascend.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qerl_rl.quant.checkpoint import CheckpointReader
from tests.npu_sim.test_training import BLOCK, PADDING
from tests.trainer.runs import launch, rows

pytestmark = pytest.mark.ascend

SIZES = (
    "run.steps=1",
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4",
    "algorithm.prompts_per_mini_batch=4",
    # Adapters of whole experts and of half matrices: most of what the engines get comes from the other rank.
    "train.tensor_parallel=2",
    "train.expert_parallel=2",
    "swap.checksum=always",
    "swap.canary=always",
    "noise.stages=2",
    "reward.function=tests.trainer.reward_functions.share_of_digits",
)
PHASES = ("rollout", "train")
OTHERWISE = ("time/", "tokens_per_s/", "memory/")


@pytest.fixture(scope="module")
def runs(tiny_w8a8: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Path]]:
    """By device: the console of a run and its folder."""
    found = {}
    for device in ("cpu", "npu-sim"):
        folder = tmp_path_factory.mktemp(device)
        console = launch("quickstart_cpu.yaml", tiny_w8a8("qwen3_moe"), folder, f"train.device={device}", *SIZES)
        found[device] = console, folder
    return found


def test_figures_of_the_step_are_those_of_a_cpu(runs: dict[str, Any]) -> None:
    [npu], [cpu] = (rows(runs[device][1] / "metrics.jsonl") for device in ("npu-sim", "cpu"))
    assert npu.keys() == cpu.keys()
    compared = {name: value for name, value in cpu.items() if not name.startswith(OTHERWISE)}
    assert compared["grad_norm"] > 0
    # The engine drew the same tokens; the trainer's log-probs differ in float32's last digits, as do their means.
    for name, value in compared.items():
        assert npu[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_the_first_line_says_what_is_not_proven(runs: dict[str, Any]) -> None:
    first = runs["npu-sim"][0].splitlines()[0]
    assert all(word in first for word in ("simulated NPU", "numerics", "NZ formats", "limits of kernels", "speed"))
    assert "simulated" not in runs["cpu"][0]


def test_the_card_holds_the_trainer_only_while_that_has_it(
    runs: dict[str, Any], tiny_w8a8: Callable[..., Path]
) -> None:
    with CheckpointReader(tiny_w8a8("qwen3_moe")) as reader:
        # Each storage of the trainer has at least one of these, or is one of the few that hold all adapters.
        storages = len(list(reader.names()))
    ledger = rows(runs["npu-sim"][1] / "swaps.jsonl")
    for rank in (0, 1):
        rollout, train = (next(row for row in ledger if (row["rank"], row["phase"]) == (rank, p)) for p in PHASES)
        held = {name: count for name, count in train["held_bytes"].items() if name.startswith("train/")}
        rose = train["device_bytes"] - rollout["device_bytes"]
        assert sum(held.values()) <= rose <= sum(held.values()) + storages * (BLOCK + PADDING)
        assert {rollout["held_bytes"][name] for name in held} == {0}
        # By a bucket a peer through HCCL's batches, and the sums of both sides agreed.
        assert rollout["traffic"]["same_node_bytes"] > 0
        assert rollout["checksum_bytes"] > 0
