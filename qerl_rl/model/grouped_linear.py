"""The one matrix product of the quantized model: y = x W^T + scaling (x A^T) B^T, a group of rows for each expert.

Attention is the case of one group. The base W is floating point or stored in a format; the adapter is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.model.base_weight import Base, Unpacker
from qerl_rl.platform.columns import scale_columns
from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class Adapter:
    """LoRA of E groups: a [E, r, K], b [E, N, r]; scaling is alpha / r."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


class GroupProduct:
    """The product with the weights of one group at a time, and its gradients; dtype: of the activations.

    Matrices are taken apart by group beforehand: threads would wait for each other at each view.
    """

    def __init__(self, base: Base, adapter: Adapter | None, dtype: torch.dtype) -> None:
        self.rank = 0 if adapter is None else adapter.a.size(1)
        self.inputs, self.outputs = base.inputs, base.outputs
        self._unpacker, self._has_adapter = Unpacker(base, dtype), adapter is not None
        self._scales = None if base.row_scales is None else base.row_scales.unbind()
        if adapter is not None:
            self._scaling, self._a, self._b = adapter.scaling, adapter.a.unbind(), adapter.b.unbind()
            self._b_transposed = adapter.b.transpose(1, 2).unbind()
            self._a_transposed = adapter.a.transpose(1, 2).unbind()

    def forward(self, x: torch.Tensor, group: int, y: torch.Tensor, down: torch.Tensor) -> None:
        """Fills y [n, N] and, with an adapter, down [n, r] = scaling x A^T."""
        weight = self._unpacker.matrix(group).t()
        if self._scales is None:
            torch.mm(x, weight, out=y)
        else:
            scale_columns(x @ weight, self._scales[group], y)
        if self._has_adapter:
            torch.addmm(down, x, self._a_transposed[group], beta=0, alpha=self._scaling, out=down)
            y.addmm_(down, self._b_transposed[group])

    def grad_inputs(
        self, grad_y: torch.Tensor, group: int, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradients of x [n, K], into `out` where it is given, and with an adapter of x A^T [n, r]."""
        before = grad_y
        if self._scales is not None:
            before = scale_columns(grad_y, self._scales[group], torch.empty_like(grad_y))
        grad_x = torch.mm(before, self._unpacker.matrix(group), out=out)
        grad_down = self.grad_down(grad_y, group)
        if grad_down is not None:
            grad_x.addmm_(grad_down, self._a[group])
        return grad_x, grad_down

    def grad_down(self, grad_y: torch.Tensor, group: int) -> torch.Tensor | None:
        """The gradient of x A^T [n, r], with an adapter."""
        if not self._has_adapter:
            return None
        grad_down = grad_y.new_empty(grad_y.size(0), self.rank)
        return torch.addmm(grad_down, grad_y, self._b[group], beta=0, alpha=self._scaling, out=grad_down)

    def grad_adapter(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        down: torch.Tensor,
        grad_down: torch.Tensor | None,
        gradients: Sequence[torch.Tensor],
    ) -> None:
        """Fills `gradients` of the group's A and B, where there is an adapter; down: what `forward` filled, grad_down:
        the gradient of x A^T."""
        if grad_down is not None:
            torch.mm(grad_down.t(), x, out=gradients[0])
            torch.mm(grad_y.t(), down, out=gradients[1])


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
        product = GroupProduct(Base(tensors, format), adapter_of(a, b, scaling), x.dtype)
        y, down = x.new_empty(x.size(0), product.outputs), x.new_empty(x.size(0), product.rank)
        for group, span in spans(rows):
            product.forward(x[span], group, y[span], down[span])
        needs_x = a is not None or any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if needs_x else None, a, b, down if a is not None else None, *tensors)
        ctx.scaling, ctx.rows, ctx.format = scaling, rows, format
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, down, *tensors = ctx.saved_tensors
        product = GroupProduct(Base(tuple(tensors), ctx.format), adapter_of(a, b, ctx.scaling), grad_y.dtype)
        grad_y = grad_y.contiguous()
        grad_x = grad_y.new_empty(grad_y.size(0), product.inputs) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(tensors[0]) if any(ctx.needs_input_grad[6:]) else None
        of_adapter = [torch.empty_like(matrix) for matrix in (a, b) if matrix is not None]
        for group, span in spans(ctx.rows):
            if grad_x is None:
                grad_down = product.grad_down(grad_y[span], group)
            else:
                _, grad_down = product.grad_inputs(grad_y[span], group, out=grad_x[span])
            if x is not None and down is not None:
                gradients = [matrix[group] for matrix in of_adapter]
                product.grad_adapter(grad_y[span], x[span], down[span], grad_down, gradients)
            if grad_weight is not None:
                torch.mm(grad_y[span].t(), x[span], out=grad_weight[group])
        clear_idle(ctx.rows, [*of_adapter, *([] if grad_weight is None else [grad_weight])])
        return grad_x, *(of_adapter or (None, None)), None, None, None, grad_weight, *[None] * (len(tensors) - 1)


def adapter_of(a: torch.Tensor | None, b: torch.Tensor | None, scaling: float) -> Adapter | None:
    """The adapter of these matrices, if there are any: as an autograd function takes it apart."""
    return None if a is None or b is None else Adapter(a, b, scaling)


def spans(rows: list[int]) -> list[tuple[int, slice]]:
    """(group, its rows) of every group that has rows."""
    found, start = [], 0
    for group, count in enumerate(rows):
        if count:
            found.append((group, slice(start, start + count)))
        start += count
    return found


def clear_idle(rows: list[int], gradients: Sequence[torch.Tensor]) -> None:
    """Make the gradients [E, ...] zero where a group has no row."""
    idle = [group for group, count in enumerate(rows) if not count]
    for gradient in gradients if idle else ():
        gradient[idle] = 0.0


def grouped_linear(x: torch.Tensor, base: Base, adapter: Adapter | None, rows: list[int]) -> torch.Tensor:
    """y[t] = x[t] W[g]^T + scaling (x[t] A[g]^T) B[g]^T, where group g owns the next rows[g] rows of x.

    Args: x [T, K] in the dtype of the computation, T = sum(rows); rows: one count a group, zeros allowed.
    Returns: [T, N]. Gradients reach x, a floating-point base that requires them, and both adapter matrices (zeros where
    a group has no row).
    """
    a, b, scaling = (None, None, 1.0) if adapter is None else (adapter.a, adapter.b, adapter.scaling)
    return _GroupedLinear.apply(x, a, b, scaling, rows, base.format, *base.tensors)
