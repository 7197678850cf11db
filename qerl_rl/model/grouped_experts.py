"""Frozen experts with adapters where the device multiplies all groups in one call: what `expert_mlp` computes, without
its threads.

Weights of a format become floats of all experts for one product, and again in backward: one matrix of a layer at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.model.base_weight import Base, Unpacker
from qerl_rl.model.grouped_linear import Adapter
from qerl_rl.platform.ops import grouped_matmul, swiglu


def grouped_expert_mlp(
    x: torch.Tensor,
    probabilities: torch.Tensor,
    rows: list[int],
    bases: tuple[Base, Base],
    adapters: tuple[Adapter | None, Adapter | None],
) -> torch.Tensor:
    """`expert_mlp`, with its arguments and gradients."""
    hidden = _linear(x, bases[0], adapters[0], rows)
    return _linear(swiglu(hidden, probabilities), bases[1], adapters[1], rows)


def _linear(x: torch.Tensor, base: Base, adapter: Adapter | None, rows: list[int]) -> torch.Tensor:
    y = _FrozenProduct.apply(x, rows, base)
    if adapter is None:
        return y
    return y + grouped_matmul(grouped_matmul(x, adapter.a, rows), adapter.b, rows) * adapter.scaling


class _FrozenProduct(torch.autograd.Function):
    """x W^T; keeps the stored weights only, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: list[int], base: Base) -> torch.Tensor:
        ctx.rows, ctx.base = rows, base
        weights, scales = _floats(base, x.dtype, rows)
        y = grouped_matmul(x, weights, rows)
        return y if scales is None else (y * scales).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weights, scales = _floats(ctx.base, gradient.dtype, ctx.rows)
        if scales is not None:
            gradient = (gradient * scales).to(gradient.dtype)
        return grouped_matmul(gradient, weights.transpose(1, 2), ctx.rows), None, None


def _floats(base: Base, dtype: torch.dtype, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights [E, N, K], and what their products have to be multiplied by: None or [T, N] float32."""
    if base.format is None:
        return base.tensors[0], None
    unpacker = Unpacker(base, dtype)
    weights = base.tensors[0].new_empty(len(rows), base.outputs, base.inputs, dtype=dtype)
    for group, count in enumerate(rows):
        if count:
            weights[group] = unpacker.matrix(group)
    scales = base.row_scales
    if scales is None:
        return weights, None
    counts = torch.tensor(rows, device=scales.device)
    return weights, torch.repeat_interleave(scales, counts, dim=0, output_size=sum(rows))
