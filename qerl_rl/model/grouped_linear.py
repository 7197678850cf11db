"""The one matrix product of the quantized model: y = x W^T + scaling (x A^T) B^T, a group of rows for each expert.

Attention is the case of one group. The base W is int8 with one scale a row, or floating point; the adapter is optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Base:
    """The base weights of E groups: weight [E, N, K] float, or int8 with scale [E, N, 1] float32."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def workspace(self, dtype: torch.dtype) -> torch.Tensor | None:
        """[N, K] `dtype` for the integers of one group after the other; None when the weights are floats already."""
        if self.scale is None:
            return None
        return torch.empty(self.weight.shape[1:], dtype=dtype, device=self.weight.device)

    def matrix(self, group: int, workspace: torch.Tensor | None) -> torch.Tensor:
        """[N, K] of one group, int8 turned into exact floats but not scaled; valid until the next call."""
        return self.weight[group] if workspace is None else workspace.copy_(self.weight[group])

    def row_scale(self, group: int) -> torch.Tensor | None:
        """[1, N] float32, what the outputs are multiplied by: much cheaper than multiplying the weights."""
        return None if self.scale is None else self.scale[group].t()

    def scaled(self, grad_y: torch.Tensor, group: int) -> torch.Tensor:
        """Gradient of the outputs before they were multiplied by the scales."""
        row_scale = self.row_scale(group)
        return grad_y if row_scale is None else torch.mul(grad_y, row_scale, out=torch.empty_like(grad_y))


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
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scaling: float,
        rows: list[int],
    ) -> torch.Tensor:
        base = Base(weight, scale)
        y = x.new_empty(x.size(0), weight.size(1))
        down = None if a is None else x.new_empty(x.size(0), a.size(1))
        workspace = base.workspace(x.dtype)
        for group, (start, end) in _spans(rows):
            torch.mm(x[start:end], base.matrix(group, workspace).t(), out=y[start:end])
            if (row_scale := base.row_scale(group)) is not None:
                y[start:end].mul_(row_scale)
            if a is not None and b is not None and down is not None:
                torch.mm(x[start:end], a[group].t(), out=down[start:end])
                y[start:end].addmm_(down[start:end], b[group].t(), alpha=scaling)
        needs_x = a is not None or ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_x else None, weight, scale, a, b, down)
        ctx.scaling, ctx.rows = scaling, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, weight, scale, a, b, down = ctx.saved_tensors
        base = Base(weight, scale)
        grad_y = grad_y.contiguous()
        grad_x = grad_y.new_empty(grad_y.size(0), weight.size(2)) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_a, grad_b = (None, None) if a is None else (torch.empty_like(a), torch.empty_like(b))
        workspace = None if grad_x is None else base.workspace(grad_y.dtype)
        for group, (start, end) in _spans(ctx.rows):
            part = grad_y[start:end]
            if grad_x is not None:
                torch.mm(base.scaled(part, group), base.matrix(group, workspace), out=grad_x[start:end])
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
        return grad_x, grad_weight, None, grad_a, grad_b, None, None


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
    if adapter is None:
        return _GroupedLinear.apply(x, base.weight, base.scale, None, None, 1.0, rows)
    return _GroupedLinear.apply(x, base.weight, base.scale, adapter.a, adapter.b, adapter.scaling, rows)
