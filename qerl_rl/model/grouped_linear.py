"""The one matrix product of the quantized model: y = x W^T + scaling (x A^T) B^T, a group of rows for each expert.

Attention is the case of one group. The base W is floating point or stored in a format; the adapter is optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.model.base_weight import Base, Unpacker, scale_columns
from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class Adapter:
    """LoRA of E groups: a [E, r, K], b [E, N, r]; scaling is alpha / r."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class _GroupedLinear(torch.autograd.Function):
    """Dequantizes the base again in backward: no float copy of it is kept, and without adapter no x either."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scaling: float,
        rows: list[int],
        format: Format | None,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        base = Base(tensors, format)
        y = x.new_empty(x.size(0), base.outputs)
        down = None if a is None else x.new_empty(x.size(0), a.size(1))
        unpacker = Unpacker(base, x.dtype)
        for group, (start, end) in _spans(rows):
            torch.mm(x[start:end], unpacker.matrix(group).t(), out=y[start:end])
            if base.scales_outputs:
                scale_columns(y[start:end], base.row_scale(group))
            if a is not None and b is not None and down is not None:
                torch.mm(x[start:end], a[group].t(), out=down[start:end])
                y[start:end].addmm_(down[start:end], b[group].t(), alpha=scaling)
        needs_x = a is not None or any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if needs_x else None, a, b, down, *tensors)
        ctx.scaling, ctx.rows, ctx.format = scaling, rows, format
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, down, *tensors = ctx.saved_tensors
        base = Base(tuple(tensors), ctx.format)
        grad_y = grad_y.contiguous()
        grad_x = grad_y.new_empty(grad_y.size(0), base.inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(tensors[0]) if any(ctx.needs_input_grad[6:]) else None
        grad_a, grad_b = (None, None) if a is None else (torch.empty_like(a), torch.empty_like(b))
        unpacker = Unpacker(base, grad_y.dtype)
        for group, (start, end) in _spans(ctx.rows):
            part = grad_y[start:end]
            if grad_x is not None:
                scaled = scale_columns(part.clone(), base.row_scale(group)) if base.scales_outputs else part
                torch.mm(scaled, unpacker.matrix(group), out=grad_x[start:end])
            if grad_weight is not None:
                torch.mm(part.t(), x[start:end], out=grad_weight[group])
            if grad_a is not None and grad_b is not None:
                grad_down = (part @ b[group]).mul_(ctx.scaling)
                torch.mm(grad_down.t(), x[start:end], out=grad_a[group])
                torch.mm(part.t(), down[start:end], out=grad_b[group]).mul_(ctx.scaling)
                if grad_x is not None:
                    grad_x[start:end].addmm_(grad_down, a[group])
        idle = [group for group, count in enumerate(ctx.rows) if not count]
        for gradient in (grad_weight, grad_a, grad_b):
            if gradient is not None and idle:
                gradient[idle] = 0.0
        return grad_x, grad_a, grad_b, None, None, None, grad_weight, *[None] * (len(tensors) - 1)


def _spans(rows: list[int]) -> list[tuple[int, tuple[int, int]]]:
    """(group, (first row, end)) of every group that has rows."""
    spans, start = [], 0
    for group, count in enumerate(rows):
        if count:
            spans.append((group, (start, start + count)))
        start += count
    return spans


def grouped_linear(x: torch.Tensor, base: Base, adapter: Adapter | None, rows: list[int]) -> torch.Tensor:
    """y[t] = x[t] W[g]^T + scaling (x[t] A[g]^T) B[g]^T, where group g owns the next rows[g] rows of x.

    Args: x [T, K] in the dtype of the computation, T = sum(rows); rows: one count a group, zeros allowed.
    Returns: [T, N]. Gradients reach x, a floating-point base that requires them, and both adapter matrices (zeros where
    a group has no row).
    """
    a, b, scaling = (None, None, 1.0) if adapter is None else (adapter.a, adapter.b, adapter.scaling)
    return _GroupedLinear.apply(x, a, b, scaling, rows, base.format, *base.tensors)
