"""A whole model of vllm-ascend's layers gets another policy through the engine's targets, rank by rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Weights
from qerl_rl.platform import ops
from qerl_rl.rollout.full_tensors import put
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.weight_target import WeightTarget
from tests.rollout.ascend import layers, models, wheel
from tests.rollout.shards import full_weights

LAYOUTS = {"one rank": (1, 1, False), "tensor parallel": (2, 1, False), "expert parallel": (2, 1, True)}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "w8a8": {"format": "w8a8"},
    "w4a16 experts": {"format": "w4a16", "attention": "w8a8", "group_size": 32},
    "w4a8 experts": {"format": "w4a8", "attention": "none", "group_size": -1},
}


class _Held:
    """What stands in a target for a rank: its tensors by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: Callable[[str], torch.dtype]) -> None:
        self.tensors = {name: torch.zeros(shape, dtype=dtypes(name)) for name, shape in shapes.items()}

    def write(self, local: str) -> torch.Tensor:
        return self.tensors[local]

    def complete(self, local: str) -> None:
        """Nothing follows."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_another_policy_is_what_a_new_engine_would_hold(
    name: str,
    layout: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_quantized: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "to_fractal_nz", wheel.fractal_nz)
    first, second = (
        tiny_quantized(tiny_checkpoint("qwen3_moe", "bfloat16", seed=seed, layers=2), **CHECKPOINTS[name])
        for seed in (0, 1)
    )
    for rank in range(LAYOUTS[layout][0]):
        _check(first, second, LAYOUTS[layout], rank)


def _check(first: Path, second: Path, sizes: tuple[int, int, bool], rank: int) -> None:
    plan, architecture = LoadPlan(first, "910"), MoeArchitecture.from_folder(first)
    engine = EngineLayout(architecture, *sizes, full_weights(first)[0])
    noted: dict[int, Any] = {}
    description = {"group_size": 0, "ascend_quant_method": "compressed-tensors", "weight_strategy": "channel"}
    if plan.stored_format("model.layers.0.mlp.experts.0.up_proj.weight").name == "w4a16":  # type: ignore[union-attr]
        description = {"group_size": 32}
    given = wheel.given(description, wheel.AscendConfig()) | models.stubs(noted)
    with wheel.wheel(*wheel.MODULES, given=given) as load:
        plain = EngineLayout(architecture, *sizes, Weights())
        live, fresh = (models.build(load, plan, plain, rank) for _ in range(2))
        noted |= models.metadata(live)
        models.load_into(live, _cut(engine, rank, first))
        models.load_into(fresh, _cut(engine, rank, second))
        before = {path: tensor.data_ptr() for path, tensor in _held(live).items()}
        target = WeightTarget(live, models.vllm_config(), plan)
        assert target.locals == engine.local_shapes(rank)
        target.begin()
        put(target, engine, rank, full_weights(second)[1])
        assert target.finish() == sum(tensor.nbytes for tensor in _cut(engine, rank, second).values())
    found, expected = _held(live), _held(fresh)
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert torch.equal(layers.bits(found[path]), layers.bits(tensor)), path
        assert found[path].data_ptr() == before[path], path


def _cut(engine: EngineLayout, rank: int, folder: Path) -> layers.Tensors:
    """A rank's tensors of a checkpoint."""
    _, tensors = full_weights(folder)
    dtypes = {holding.local: tensors[holding.tensor].dtype for holding in engine.holdings(rank)}
    held = _Held(engine.local_shapes(rank), dtypes.__getitem__)
    put(held, engine, rank, tensors)
    return held.tensors


def _held(model: torch.nn.Module) -> layers.Tensors:
    found = {f"{path}.{name}": t for path, layer in model.named_modules() for name, t in _own(layer).items()}
    assert found
    return found


def _own(layer: torch.nn.Module) -> layers.Tensors:
    return {name: tensor for name, tensor in layers.held(layer).items() if "." not in name}
