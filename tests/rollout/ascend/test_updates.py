"""Weights written into live layers of vllm-ascend, against layers that vllm-ascend itself has filled and processed.

Its real methods run here, on a CPU. Not proved: how a card copies between tensors in FRACTAL_NZ.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qerl_rl.platform import ops
from qerl_rl.rollout.ascend.rewrite import is_ascend, rewrite
from tests.rollout.ascend import layers, wheel
from tests.rollout.ascend.layers import EXPERT_KINDS, EXPERTS, HIDDEN, LINEAR_KINDS, WIDTH, Kind, Shard

HALF = WIDTH // 2
SHARDS = {
    "all": Shard(),
    "half of the experts": Shard(experts=slice(EXPERTS // 2, EXPERTS)),
    "half of their width": Shard(width=slice(HALF, WIDTH)),
}


@pytest.fixture(autouse=True)
def _nz_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "to_fractal_nz", wheel.fractal_nz)


def _typed(layer: torch.nn.Module, tensors: layers.Tensors) -> layers.Tensors:
    return {name: tensor.to(layer.get_parameter(name).dtype) for name, tensor in tensors.items()}


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(layers.bits(first), layers.bits(second))


def _check(
    kind: Kind, make: Callable[[layers.Importer], torch.nn.Module], parts: Callable[[int], layers.Tensors], fused: int
) -> None:
    config = wheel.AscendConfig(enable_fused_mc2=fused)
    with wheel.wheel(*wheel.MODULES, given=wheel.given(kind.description, config)) as load:
        live, fresh = make(load), make(load)
        update = _typed(live, parts(2))
        layers.fill(live, parts(1))
        layers.fill(fresh, parts(2))
        before = {name: tensor.data_ptr() for name, tensor in layers.held(live).items()}
        expected = layers.held(fresh)
        constant = {name for name, each in layers.held(live).items() if _same(each, expected[name])}
        assert all(name.endswith(("_offset", "_shape")) for name in constant)
        assert is_ascend(live)
        rewrite(live, update)
    found = layers.held(live)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert _same(found[name], tensor), name
        assert found[name].data_ptr() == before[name], name


@pytest.mark.parametrize("fused", [0, 1])
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", EXPERT_KINDS)
def test_experts_rewritten_in_place_are_those_of_a_new_layer(name: str, shard: str, fused: int) -> None:
    kind, own = EXPERT_KINDS[name], SHARDS[shard]
    count, width = len(range(EXPERTS)[own.experts]), len(range(WIDTH)[own.width])
    _check(
        kind,
        lambda load: layers.experts_of(load, kind, count, width),
        lambda seed: layers.expert_parts(kind.format, seed, own),
        fused,
    )


@pytest.mark.parametrize("inputs", [HIDDEN, HIDDEN // 4])
@pytest.mark.parametrize("name", LINEAR_KINDS)
def test_linear_layers_rewritten_in_place_are_those_of_new_layers(name: str, inputs: int) -> None:
    kind = LINEAR_KINDS[name]
    _check(
        kind,
        lambda load: layers.linear_of(load, kind, inputs),
        lambda seed: layers.linear_parts(kind.format, seed, inputs),
        0,
    )
