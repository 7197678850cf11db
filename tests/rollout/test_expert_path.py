"""One expert layer with adapters against plain matrices, and against the fused int8 kernel where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu

from qerl_rl.quant.w8a8 import dequantize, quantize
from tests.ranks import run_engines

EXPERTS, TOP_K, HIDDEN, WIDTH, RANK = 8, 2, 128, 96, 8
TOKENS = (1, 3, 40, 2500)


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.float() - reference).norm() / reference.norm())


class _Layer:
    """Random expert weights, and three ways to compute with them."""

    def __init__(self, deviation: float) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float) -> torch.Tensor:
            return scale * torch.randn(shape, generator=generator)

        self.gate_up, self.gate_up_scale = quantize(normal(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5))
        self.down, self.down_scale = quantize(normal(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5))
        self.adapters = (
            normal(EXPERTS, RANK, HIDDEN, scale=deviation),
            normal(EXPERTS, 2 * WIDTH, RANK, scale=deviation),
            normal(EXPERTS, RANK, WIDTH, scale=deviation),
            normal(EXPERTS, HIDDEN, RANK, scale=deviation),
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

    def path(self, experts: slice = slice(None)) -> Any:
        from qerl_rl.rollout.expert_path import ExpertsWithAdapters

        weights = tuple(weight[experts] for weight in self.packed())
        scales = (self.gate_up_scale[experts], self.down_scale[experts])
        return ExpertsWithAdapters(weights, scales, *(adapter[experts] for adapter in self.adapters))


def _scene() -> dict[str, Any]:
    from qerl_rl.rollout.environment import configure_environment

    configure_environment()
    import vllm._custom_ops  # noqa: F401 - loads the CPU kernels

    seen: dict[str, Any] = {}
    for name, deviation in (("plain", 0.0), ("adapted", 0.2)):
        layer = _Layer(deviation)
        for tokens in TOKENS:
            hidden, weights, ids = layer.inputs(tokens)
            reference = layer.reference(hidden, weights, ids)
            output, fused = layer.path()(hidden, weights, ids), layer.fused(hidden, weights, ids)
            seen[name, tokens] = {
                "path": _relative(output, reference),
                "fused": _relative(fused, reference),
                "apart": _relative(output, fused.float()),
            }
        halves = sum(
            layer.path(slice(start, start + 4))(hidden, weights, torch.where(ids // 4 == start // 4, ids - start, -1))
            for start in (0, 4)
        )
        seen[name, "split"] = bool(torch.equal(halves, output))
        seen[name, "row alone"] = bool(torch.allclose(layer.path()(hidden[:1], weights[:1], ids[:1]), output[:1]))
        seen[name, "nothing here"] = float(layer.path()(hidden, weights, torch.full_like(ids, -1)).abs().max())
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_engines(_scene, 1)[0]


@pytest.mark.parametrize("tokens", TOKENS)
def test_without_adapters_it_is_as_exact_as_the_fused_kernel(seen: dict[str, Any], tokens: int) -> None:
    errors = seen["plain", tokens]
    assert errors["path"] < 0.02
    assert errors["path"] < 1.25 * errors["fused"]
    # Both round the activations of the same tokens to int8: they are closer to each other than to the truth.
    assert errors["apart"] < errors["fused"]


@pytest.mark.parametrize("tokens", TOKENS)
def test_adapters_act_inside_the_experts(seen: dict[str, Any], tokens: int) -> None:
    errors = seen["adapted", tokens]
    assert errors["path"] < 0.02
    assert errors["fused"] > 0.3


def test_experts_of_two_ranks_sum_to_those_of_one(seen: dict[str, Any]) -> None:
    for name in ("plain", "adapted"):
        assert seen[name, "split"]
        assert seen[name, "row alone"]
        assert seen[name, "nothing here"] == 0
