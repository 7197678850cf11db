"""A whole model of vllm-ascend's layers gets another policy through the engine's targets, rank by rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Adapters, Weights, full_tensors
from qerl_rl.platform import ops
from qerl_rl.rollout.full_tensors import exchange_format, put
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.merge import MergedAdapters
from qerl_rl.rollout.merge_shards import ShardFinder
from qerl_rl.rollout.weight_target import WeightTarget
from tests.rollout.ascend import layers, models, wheel
from tests.rollout.scenes import LORA, random_adapters, write_merged
from tests.rollout.shards import full_weights

LAYOUTS = {"one rank": (1, 1, False), "tensor parallel": (2, 1, False), "expert parallel": (2, 1, True)}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "w8a8": {"format": "w8a8"},
    "w4a16 experts": {"format": "w4a16", "attention": "w8a8", "group_size": 32},
    "w4a8 experts": {"format": "w4a8", "attention": "none", "group_size": -1},
    "w4a8 experts, msmodelslim": {
        **{"format": "w4a8", "attention": "w8a8", "group_size": -1},
        "layout": "msmodelslim",
    },
}


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
    given = wheel.given(models.description(plan), wheel.AscendConfig()) | models.stubs(noted)
    with wheel.wheel(*wheel.MODULES, given=given) as load:
        plain = EngineLayout(architecture, *sizes, Weights())
        live, fresh = (models.build(load, plan, plain, rank) for _ in range(2))
        noted |= models.metadata(live)
        models.load_into(live, models.cut(engine, rank, first))
        models.load_into(fresh, models.cut(engine, rank, second))
        before = {path: tensor.data_ptr() for path, tensor in models.held(live).items()}
        target = WeightTarget(live, models.vllm_config(), plan)
        assert target.locals == engine.local_shapes(rank)
        target.begin()
        put(target, engine, rank, full_weights(second)[1])
        assert target.finish() == sum(tensor.nbytes for tensor in models.cut(engine, rank, second).values())
    found, expected = models.held(live), models.held(fresh)
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert torch.equal(layers.bits(found[path]), layers.bits(tensor)), path
        assert found[path].data_ptr() == before[path], path


@pytest.mark.parametrize("name", ["w4a16 experts", "w4a8 experts", "w4a8 experts, msmodelslim"])
def test_merged_adapters_are_what_a_new_engine_on_the_merged_checkpoint_would_hold(
    name: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_quantized: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_quantized(tiny_checkpoint("qwen3_moe", "bfloat16", layers=2), **CHECKPOINTS[name])
    adapters = random_adapters(folder, seed=1, deviation=0.05)
    merged = write_merged(folder, adapters, tmp_path, as_floats=False)
    plan, architecture = LoadPlan(folder, "910"), MoeArchitecture.from_folder(folder)
    layout, plain = (EngineLayout(architecture, 1, 1, False, kinds) for kinds in (full_weights(folder)[0], Weights()))
    lora, kinds = dataclasses.replace(LORA, in_rollout="merge", merge_rounding="nearest"), Adapters(LORA)
    noted: dict[int, Any] = {}
    given = wheel.given(models.description(plan), wheel.AscendConfig()) | models.stubs(noted)
    with wheel.wheel(*wheel.MODULES, given=given) as load:
        live, fresh = (models.build(load, plan, plain, 0) for _ in range(2))
        noted |= models.metadata(live)
        models.load_into(live, models.cut(layout, 0, folder))
        models.load_into(fresh, models.cut(layout, 0, merged))
        adapter_layout = EngineLayout(architecture, 1, 1, False, kinds)
        target = MergedAdapters(
            live,
            models.vllm_config(),
            plan,
            lora,
            0,
            ShardFinder(architecture, plain, 0),
            adapter_layout.local_shapes(0),
        )
        target.begin(1)
        put(target, adapter_layout, 0, exchange_format(full_tensors(architecture, kinds), adapters))
        target.finish()
    found = models.held(live)
    for path, tensor in models.held(fresh).items():
        assert torch.equal(layers.bits(found[path]), layers.bits(tensor)), path
