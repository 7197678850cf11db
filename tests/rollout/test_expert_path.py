"""One expert layer with adapters against plain matrices, and against the fused int8 kernel where there are none: with
vLLM's products, and on AMX tiles where the processor has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from qerl_rl.quant.w8a8 import dequantize, quantize
from tests.ranks import run_engines

EXPERTS, TOP_K, HIDDEN = 8, 2, 128
WIDTHS = {"products": 96, "tiles": 192}
"""Tiles of int8 have 64 columns."""
RANKS = {"products": 6, "tiles": 40}
"""No multiples of what adapters are padded to."""
DEVIATIONS = {"products": 0.2, "tiles": 0.1}
"""Of adapters' numbers."""
WAYS = ("products", "tiles") if torch.cpu._is_amx_tile_supported() else ("products",)
TOKENS = (1, 3, 40, 2500)


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference).norm() / reference.norm())


class _Layer:
    """Random expert weights, and three ways to compute with them."""

    def __init__(self, way: str, deviation: float) -> None:
        self.way, width, rank = way, WIDTHS[way], RANKS[way]
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return scale * torch.randn(shape, generator=generator)

        self.gate_up, self.gate_up_scale = quantize(normal(EXPERTS, 2 * width, HIDDEN, scale=HIDDEN**-0.5))
        self.down, self.down_scale = quantize(normal(EXPERTS, HIDDEN, width, scale=width**-0.5))
        self.adapters = (
            normal(EXPERTS, rank, HIDDEN, scale=deviation),
            normal(EXPERTS, 2 * width, rank, scale=deviation),
            normal(EXPERTS, rank, width, scale=deviation),
            normal(EXPERTS, HIDDEN, rank, scale=deviation),
        )
        self.generator = generator

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, router weights and expert ids; expert 5 gets no token."""
        hidden = torch.randn(tokens, HIDDEN, generator=self.generator).bfloat16()
        scores = torch.randn(tokens, EXPERTS, generator=self.generator)
        scores[:, 5] = -torch.inf
        weights, ids = scores.softmax(-1).topk(TOP_K)
        return hidden, weights, ids

    def reference(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """In float32 with W + B A merged."""
        gate_up = dequantize(self.gate_up, self.gate_up_scale) + self.adapters[1] @ self.adapters[0]
        down = dequantize(self.down, self.down_scale) + self.adapters[3] @ self.adapters[2]
        output = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in range(EXPERTS):
            token, slot = torch.nonzero(ids == expert, as_tuple=True)
            gate, up = (hidden[token].float() @ gate_up[expert].t()).chunk(2, dim=-1)
            output.index_add_(0, token, weights[token, slot, None] * ((silu(gate) * up) @ down[expert].t()))
        return output

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops._C.convert_weight_packed(self.gate_up), torch.ops._C.convert_weight_packed(self.down)

    def fused(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """vLLM's kernel, which knows no adapters."""
        from vllm import _custom_ops as ops

        output = torch.empty_like(hidden)
        scales = (self.gate_up_scale, self.down_scale)
        method = ops.CPUQuantMethod.INT8_W8A8
        nothing = [None] * 7
        ops.fused_experts_cpu(output, hidden, *self.packed(), weights, ids.int(), method, *scales, *nothing, True)
        return output

    def path(self, experts: slice = slice(None), adapted: bool = True) -> Any:
        from qerl_rl.rollout.expert_path import ExpertsWithAdapters
        from qerl_rl.rollout.int8_experts import Int8Experts, has_tiles_for

        weights = tuple(weight[experts] for weight in self.packed())
        scales = (self.gate_up_scale[experts], self.down_scale[experts])
        adapters = [adapter[experts] for adapter in self.adapters]
        assert has_tiles_for(HIDDEN, WIDTHS[self.way]) == (self.way == "tiles")
        if self.way == "products":
            return ExpertsWithAdapters(weights, scales, *adapters)
        return Int8Experts(weights, scales, (tuple(adapters[:2]), tuple(adapters[2:])) if adapted else ())


def _run(path: Any, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    # What was in the output has no effect.
    output = torch.full_like(hidden, torch.nan)
    path(output, hidden, weights, ids)
    return output


def _scene() -> dict[str, Any]:
    from qerl_rl.rollout.environment import configure_environment

    configure_environment()
    import vllm._custom_ops  # noqa: F401 - loads the CPU kernels

    seen: dict[str, Any] = {}
    for way in WAYS:
        for name, deviation in (("plain", 0.0), ("adapted", DEVIATIONS[way])):
            seen[way, name] = _seen_of(_Layer(way, deviation))
        seen[way, "in vLLM"] = _seen_in_vllm(_Layer(way, 0.0))
    return seen


def _seen_in_vllm(layer: _Layer) -> tuple[bool, bool]:
    """Whether vLLM's kernel for such a layer has another `apply`; and if so whether that is the path's, told by a map
    which experts are here."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    from qerl_rl.rollout.int8_experts import experts_on_tiles

    experts_on_tiles()
    kernel, module = object.__new__(CPUExpertsInt8), torch.nn.Module()
    for name, tensor in (("w13_weight", layer.gate_up), ("w2_weight", layer.down)):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    for name, tensor in (("w13_weight_scale", layer.gate_up_scale), ("w2_weight_scale", layer.down_scale)):
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    kernel.process_weights_after_loading(module)
    if "apply" not in vars(kernel):
        return False, False
    hidden, weights, ids = layer.inputs(40)
    # Expert e is the model's number e + 8; one of the even ones is here, one of the odd ones is not.
    here = torch.full((16,), -1)
    here[8::2] = torch.arange(0, EXPERTS, 2)
    output = torch.empty_like(hidden)
    names = {"topk_weights": weights, "topk_ids": ids + 8, "expert_map": here, "activation": None}
    kernel.apply(output=output, hidden_states=hidden, **names)
    expected = _run(layer.path(), hidden, weights, torch.where(ids % 2 == 0, ids, -1))
    return True, bool(torch.equal(output, expected))


def _seen_of(layer: _Layer) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    path = layer.path()
    for tokens in TOKENS:
        inputs = layer.inputs(tokens)
        reference, output, fused = layer.reference(*inputs), _run(path, *inputs), layer.fused(*inputs)
        seen[tokens] = {
            "path": _relative(output, reference),
            "fused": _relative(fused, reference),
            "apart": _relative(output, fused.float()),
        }
    hidden, weights, ids = inputs
    halves = sum(
        _run(layer.path(half), hidden, weights, torch.where(ids // 4 == half.start // 4, ids - half.start, -1)).float()
        for half in (slice(0, 4), slice(4, 8))
    )
    seen["split"] = bool(torch.equal(halves.bfloat16(), output))
    rows = [(slice(0, 1), slice(0, 1)), (slice(7, 10), slice(7, 10))]
    seen["row alone"] = all(
        bool(torch.equal(_run(path, hidden[some], weights[some], ids[some]), output[there])) for some, there in rows
    )
    seen["nothing here"] = float(_run(path, hidden, weights, torch.full_like(ids, -1)).abs().max())
    seen["no token"] = tuple(_run(path, hidden[:0], weights[:0], ids[:0]).shape)
    broken = hidden.clone()
    broken[3, 5] = torch.nan
    rows_of_nan = _run(path, broken, weights, ids).isnan().any(1)
    seen["rows of nan"] = rows_of_nan.nonzero().flatten().tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    seen["threads"] = bool(torch.equal(_run(path, hidden, weights, ids), output))
    torch.set_num_threads(threads)
    seen["without"] = bool(torch.equal(_run(layer.path(adapted=False), hidden, weights, ids), output))
    for adapter in layer.adapters:
        adapter.mul_(2)
    path.pack_adapters()
    inputs = layer.inputs(40)
    seen["updated"] = _relative(_run(path, *inputs), layer.reference(*inputs))
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_engines(_scene, 1)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_without_adapters_it_is_as_exact_as_the_fused_kernel(seen: dict[Any, Any], way: str, tokens: int) -> None:
    errors = seen[way, "plain"][tokens]
    # That of a single token is its luck, and the kernel's as well.
    assert errors["path"] < 0.02 or tokens == 1
    assert errors["path"] < 1.25 * errors["fused"]
    # Both round the activations of the same tokens to int8: they are closer to each other than to the truth.
    assert errors["apart"] < errors["fused"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_adapters_act_inside_the_experts(seen: dict[Any, Any], way: str, tokens: int) -> None:
    errors = seen[way, "adapted"][tokens]
    assert errors["path"] < 0.02
    assert errors["fused"] > 0.3


@pytest.mark.parametrize("way", WAYS)
def test_vllms_kernel_computes_on_tiles_where_they_fit(seen: dict[Any, Any], way: str) -> None:
    assert seen[way, "in vLLM"] == (way == "tiles", way == "tiles")


@pytest.mark.parametrize("way", WAYS)
def test_adapters_may_change_in_place(seen: dict[Any, Any], way: str) -> None:
    assert seen[way, "adapted"]["updated"] < 0.02


@pytest.mark.parametrize("name", ["plain", "adapted"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_token_gets_depends_on_it_alone(seen: dict[Any, Any], way: str, name: str) -> None:
    found = seen[way, name]
    assert found["split"], "two ranks with half of the experts each"
    assert found["row alone"]
    assert found["threads"]
    assert found["nothing here"] == 0
    assert found["no token"] == (0, HIDDEN)


@pytest.mark.parametrize("name", ["plain", "adapted"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_number_stays_with_its_token(seen: dict[Any, Any], way: str, name: str) -> None:
    assert seen[way, name]["rows of nan"] == [3]


@pytest.mark.skipif("tiles" not in WAYS, reason="the processor has no AMX")
def test_adapters_of_zero_are_as_none(seen: dict[Any, Any]) -> None:
    assert seen["tiles", "plain"]["without"]
    assert not seen["tiles", "adapted"]["without"]
