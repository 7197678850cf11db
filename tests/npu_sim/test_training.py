"""Training on simulated NPUs, with its state leaving the card between updates: figures, and the card's memory.

Not proven here: numerics of the kernels, NZ formats, limits of kernels, speed, HCCL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qerl_rl.platform import detect
from tests.ranks import RankPool
from tests.train.models import make_checkpoints, make_config, make_samples, policy_gradient, share, start_engine

pytestmark = pytest.mark.ascend

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {},
    "tensor 2, expert 2": {"tensor_parallel": 2, "expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
    "pipeline 2, bfloat16": {"pipeline_parallel": 2, "dtype": "bfloat16"},
}
UPDATES = 3
BLOCK, PADDING = 512, 32
"""Bytes: torch_npu's allocator pads a request, then takes whole blocks."""


def block(nbytes: int) -> int:
    """What the allocator counts for a request."""
    return -(-(nbytes + PADDING) // BLOCK) * BLOCK


def _train(paths: dict[str, str], device: str) -> dict[str, dict[str, Any]]:
    """In each layout: updates with the state away before each, and the card's memory meanwhile."""
    found = {}
    for name, layout in LAYOUTS.items():
        config = make_config(paths, workers=2, device=device, **layout)
        engine = start_engine(config)
        own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
        card, updates, moves = detect(device), [], []
        for _ in range(UPDATES):
            held = engine.held_bytes()
            in_memory = card.memory().used_bytes
            freed = engine.offload()
            away = card.memory().used_bytes
            returned = engine.onload()
            engine.finish_moves()
            back = card.memory().used_bytes
            # Of every storage that left; the ledger counts what is in them, the allocator blocks.
            blocks = sum(block(piece.bytes) for piece in engine._offloader._pieces.values())
            moves.append(
                {"held": held, "freed": freed, "returned": returned, "blocks": blocks}
                | {"fell": in_memory - away, "rose": back - away}
            )
            updates.append(engine.update(own, policy_gradient))
        scores = engine.log_probs(own)
        found[name] = {
            "updates": updates,
            "moves": moves,
            "log_probs": scores and np.concatenate(scores.log_probs),
            "storages": len(engine._offloader._pieces),
        }
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_checkpoints(Path(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="module")
def of_npus(two_simulated: RankPool, paths: dict[str, str]) -> list[dict]:
    return two_simulated(_train, paths, "npu-sim")


@pytest.fixture(scope="module")
def of_cpus(two_ranks: RankPool, paths: dict[str, str]) -> list[dict]:
    return two_ranks(_train, paths, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_with_offloads_between_are_those_of_cpus(of_npus: list, of_cpus: list, layout: str) -> None:
    rounding = 2.0**-8 if "bfloat16" in layout else 1e-5
    for npu, cpu in zip(of_npus, of_cpus, strict=True):
        for update, expected in zip(npu[layout]["updates"], cpu[layout]["updates"], strict=True):
            # The loss is a mean of log-probs times advantages of both signs: as far off as those, but much smaller.
            loss, of_log_probs = expected.pop("loss"), rounding * abs(expected["log_prob"])
            assert update.pop("loss") == pytest.approx(loss, abs=of_log_probs)
            assert update == pytest.approx(expected, rel=rounding)
        if cpu[layout]["log_probs"] is None:
            continue
        if "bfloat16" not in layout:
            np.testing.assert_allclose(npu[layout]["log_probs"], cpu[layout]["log_probs"], atol=1e-4)
            continue
        # Both round, in other places: neither may be further from float32 than twice the other.
        exact = cpu[layout.removesuffix(", bfloat16")]["log_probs"]
        of_npu, of_cpu = (float(np.abs(each[layout]["log_probs"] - exact).mean()) for each in (npu, cpu))
        assert 0 < of_npu < 2 * of_cpu < 4 * of_npu


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_the_card_falls_and_rises_by_the_ledger(of_npus: list, layout: str) -> None:
    for rank in of_npus:
        for move in rank[layout]["moves"]:
            assert move["freed"] == move["held"] == move["returned"]
            assert move["fell"] == move["rose"] == move["blocks"]
            ledger = sum(move["freed"].values())
            assert ledger <= move["blocks"] < ledger + rank[layout]["storages"] * (BLOCK + PADDING)
        # Adam's moments come with the first update.
        assert rank[layout]["moves"][0]["fell"] < rank[layout]["moves"][1]["fell"]
