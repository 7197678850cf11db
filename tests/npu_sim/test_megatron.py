"""The model that trains, on simulated NPUs through the real transfer_to_npu: losses and gradients are those of the CPU.

Not proven here: numerics of the kernels, NZ formats, limits of kernels, speed, HCCL, MindSpeed's own patches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.platform import detect
from tests.model import harness
from tests.ranks import RankPool

pytestmark = pytest.mark.ascend

Found = dict[str, tuple[float, dict[str, torch.Tensor]]]
LAYOUTS = {
    "each rank alone": TrainConfig(),
    "each rank alone, recomputed": TrainConfig(recompute="full"),
    "TP2, sequence parallel": TrainConfig(tensor_parallel=2),
    "EP2": TrainConfig(expert_parallel=2),
    "PP2": TrainConfig(pipeline_parallel=2),
}


def _losses_and_gradients(folder: Path, layouts: dict[str, TrainConfig], device: str) -> Found:
    """Of each layout: the loss and the adapters' gradients."""
    found = {}
    for name, train in layouts.items():
        harness.start(train, device)
        loaded = harness.load(folder, train, LoraConfig(rank=4))
        loaded.model.to(detect(device).current())
        harness.set_random_adapters(loaded)
        loss = harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
        gradients = harness.summed_gradients(loaded)
        found[name] = loss, {key: gradient.cpu() for key, gradient in gradients.items()}
    return found


def _compare(found: list[Found], expected: list[Found]) -> None:
    for of_rank, other in zip(found, expected, strict=True):
        for layout, (loss, gradients) in other.items():
            assert of_rank[layout][0] == pytest.approx(loss, rel=1e-5), layout
            assert of_rank[layout][1].keys() == gradients.keys()
            for name, gradient in gradients.items():
                # Of float32, through four layers: what two layouts on one CPU may differ by.
                bound = 1e-4 * float(gradient.abs().max())
                torch.testing.assert_close(
                    of_rank[layout][1][name], gradient, rtol=0, atol=bound, msg=f"{layout} {name}"
                )


def test_npus_give_losses_and_gradients_of_cpus(
    tiny_w8a8: Callable[..., Path], two_ranks: RankPool, two_simulated: RankPool
) -> None:
    folder = tiny_w8a8("qwen3_moe")
    found = two_simulated(_losses_and_gradients, folder, LAYOUTS, "npu-sim")
    assert found[0]["each rank alone"][0] > 0
    _compare(found, two_ranks(_losses_and_gradients, folder, LAYOUTS, "cpu"))
