"""bfloat16 training on quantized experts that an NPU multiplies with as they are stored, against a CPU's.

Not proven here: numerics of the kernels, NZ formats, limits of kernels, speed.
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

FORMATS: dict[str, dict[str, int]] = {"w8a8": {}, "w4a16": {"group_size": 32}}
Found = dict[str, tuple[float, dict[str, torch.Tensor]]]


def _losses_and_gradients(folders: dict[str, Path], dtype: str, device: str) -> Found:
    """By format: the loss and the adapters' gradients."""
    train, found = TrainConfig(dtype=dtype), {}
    for name, folder in folders.items():
        harness.start(train, device)
        loaded = harness.load(folder, train, LoraConfig(rank=4))
        loaded.model.to(detect(device).current())
        harness.set_random_adapters(loaded)
        loss = harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
        gradients = harness.summed_gradients(loaded)
        found[name] = loss, {key: gradient.cpu().float() for key, gradient in gradients.items()}
    return found


def _watched(folders: dict[str, Path], dtype: str, device: str) -> tuple[Found, set[str]]:
    """`_losses_and_gradients`, and which types of weights npu_grouped_matmul was given."""
    # What it imports looks at the operators of torch.ops, which are no plain functions.
    harness.start(TrainConfig(dtype=dtype), device)
    kinds: set[str] = set()
    kernel = torch.ops.npu.npu_grouped_matmul

    def noted(x: list[torch.Tensor], weight: list[torch.Tensor], **options: object) -> object:
        kinds.add(str(weight[0].dtype))
        return kernel(x, weight, **options)

    # Processes stay for other tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.npu, "npu_grouped_matmul", noted)
        return _losses_and_gradients(folders, dtype, device), kinds


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The norm of the difference of all gradients, as a share of the norm of all."""
    assert one.keys() == other.keys()
    squares = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (squares / sum(float(gradient.square().sum()) for gradient in other.values())) ** 0.5


def test_bfloat16_losses_and_gradients_are_as_near_to_float32_as_a_cpus(
    tiny_checkpoint: Callable[..., Path],
    tiny_quantized: Callable[..., Path],
    two_ranks: RankPool,
    two_simulated: RankPool,
) -> None:
    source = tiny_checkpoint("qwen3_moe", layers=1)
    folders = {name: tiny_quantized(source, name, **options) for name, options in FORMATS.items()}
    found, kinds = two_simulated(_watched, folders, "bfloat16", "npu-sim")[0]
    # int4 comes in int32; the adapters are floats.
    assert kinds == {"torch.int8", "torch.int32", "torch.bfloat16"}
    on_cpu = two_ranks(_losses_and_gradients, folders, "bfloat16", "cpu")[0]
    exact = two_ranks(_losses_and_gradients, folders, "float32", "cpu")[0]
    for name, (loss, gradients) in exact.items():
        # The logits of each token are rounded to 8 bits.
        assert found[name][0] == pytest.approx(loss, rel=2**-8)
        # Two computations with as many roundings, but in other places.
        assert _distance(found[name][1], gradients) < 2 * _distance(on_cpu[name][1], gradients)
