"""Frozen experts with adapters, forward and backward: each thread takes one expert after the other.

What an expert's tokens pass through stays in the cache until it is the next one's turn; an expert's weights become
floats just before a product needs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.model.base_weight import Base
from qerl_rl.model.grouped_experts import grouped_expert_mlp
from qerl_rl.model.grouped_linear import Adapter, GroupProduct, adapter_of, clear_idle
from qerl_rl.platform.bfloat16_loops import has_loops
from qerl_rl.platform.ops import on_npu, weighted_swiglu, weighted_swiglu_backward
from qerl_rl.platform.threads import on_threads
from qerl_rl.quant.formats import Format

TILE_ROWS = 16
"""Of a matrix unit (AMX)."""


class _ExpertMlp(torch.autograd.Function):
    """Keeps the inputs, the first matrix's outputs and the products with A, but no weights as floats."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        probabilities: torch.Tensor,
        a13: torch.Tensor | None,
        b13: torch.Tensor | None,
        a2: torch.Tensor | None,
        b2: torch.Tensor | None,
        scaling: float,
        rows: list[int],
        formats: tuple[Format | None, Format | None],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        matrices, whole = (a13, b13, a2, b2), _kernel_rows(rows, x)
        hidden, y = x.new_empty(sum(whole), _bases(tensors, formats)[0].outputs), torch.empty_like(x)
        downs = x.new_empty(2, sum(whole), 0 if a13 is None else a13.size(1))
        inputs, parts = _from_first(rows, whole, x, probabilities), _by_group(whole, hidden, *downs)
        outputs = y.split(rows)

        def some_groups(share: list[int]) -> None:
            first, second = _products(tensors, formats, matrices, scaling, x.dtype)
            for group in share:
                (own_x, own_probabilities), (pre, *own_downs), count = inputs[group], parts[group], rows[group]
                first.forward(own_x, group, pre, own_downs[0])
                output = _room(outputs[group], whole[group])
                second.forward(weighted_swiglu(pre, own_probabilities), group, output, own_downs[1])
                _keep(output, outputs[group])
                _clear(count, *own_downs)

        on_threads(some_groups, _heaviest_first(rows))
        ctx.save_for_backward(x, probabilities, hidden, downs, a13, b13, a2, b2, *tensors)
        ctx.scaling, ctx.rows, ctx.whole, ctx.formats = scaling, rows, whole, formats
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        x, probabilities, hidden, downs, *rest = ctx.saved_tensors
        matrices, tensors, grad_y = rest[:4], rest[4:], grad_y.contiguous()
        grad_x, grad_probabilities = torch.empty_like(x), torch.empty_like(probabilities)
        of_adapters = [torch.empty_like(matrix) for matrix in matrices if matrix is not None]

        of_groups, rows, whole = [matrix.unbind() for matrix in of_adapters], ctx.rows, ctx.whole
        inputs = _from_first(rows, whole, x, probabilities, grad_y)
        parts, outputs = _by_group(whole, hidden, *downs), _by_group(rows, grad_x, grad_probabilities)

        def some_groups(share: list[int]) -> None:
            first, second = _products(tensors, ctx.formats, matrices, ctx.scaling, x.dtype)
            for group in share:
                (own_x, own, grad_out), (pre, *own_downs), count = inputs[group], parts[group], rows[group]
                gradients = [matrix[group] for matrix in of_groups]
                grad_output, grad_down = second.grad_inputs(grad_out, group)
                grad_pre, grad_own, output = weighted_swiglu_backward(grad_output, pre, own)
                _clear(count, grad_down)
                second.grad_adapter(grad_out, output, own_downs[1], grad_down, gradients[2:])
                grad_in = _room(outputs[group][0], whole[group])
                _, grad_down = first.grad_inputs(grad_pre, group, out=grad_in)
                _clear(count, grad_down)
                first.grad_adapter(grad_pre, own_x, own_downs[0], grad_down, gradients[:2])
                _keep(grad_in, outputs[group][0])
                _keep(grad_own, outputs[group][1])

        on_threads(some_groups, _heaviest_first(rows))
        clear_idle(rows, of_adapters)
        return grad_x, grad_probabilities, *(of_adapters or [None] * 4), *[None] * (3 + len(tensors))


def _heaviest_first(rows: list[int]) -> list[int]:
    """The groups that have rows: dealt out in this order, threads get about as many rows."""
    return sorted((group for group, count in enumerate(rows) if count), key=lambda group: -rows[group])


def _kernel_rows(rows: list[int], x: torch.Tensor) -> list[int]:
    """How many rows each group is computed with: of bfloat16 whole tiles, and 16 numbers between two powers of two.

    oneDNN compiles its kernels for every number of rows that it has not met, which takes several times as long as to
    run them.
    """
    if not has_loops(x):
        return rows
    steps = [max(TILE_ROWS, 1 << max(count.bit_length() - 5, 0)) for count in rows]
    return [-(-count // step) * step for count, step in zip(rows, steps, strict=True)]


def _by_group(rows: list[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """The rows of each group in all tensors; threads that each asked for a view of their own would wait for each other
    (for Python's lock), so that they get all of them beforehand."""
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def _from_first(rows: list[int], whole: list[int], *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """`whole` rows from the first of each group on. Behind its own are those of the next ones, which are computed for
    nothing: no copy has to be made; behind the last are zeros."""
    starts = [0, *itertools.accumulate(rows)]
    return [tuple(_window(x, start, count) for x in tensors) for start, count in zip(starts, whole, strict=False)]


def _window(tensor: torch.Tensor, start: int, count: int) -> torch.Tensor:
    part = tensor[start : start + count]
    missing = count - len(part)
    return torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) if missing else part


def _room(part: torch.Tensor, count: int) -> torch.Tensor:
    """The part itself, or another tensor if it has not as many rows."""
    return part if len(part) == count else part.new_empty(count, *part.shape[1:])


def _keep(computed: torch.Tensor, part: torch.Tensor) -> None:
    """Put what was computed for a group's own rows where it belongs."""
    if computed is not part:
        part.copy_(computed[: len(part)])


def _clear(count: int, *downs: torch.Tensor | None) -> None:
    """Make zero what was computed for nothing: the gradients of A and B then have no share of it."""
    for down in downs:
        if down is not None and len(down) > count:
            down[count:].zero_()


def _bases(tensors: Sequence[torch.Tensor], formats: tuple[Format | None, Format | None]) -> tuple[Base, Base]:
    count = len(formats[0].parts) if formats[0] else 1
    return Base(tuple(tensors[:count]), formats[0]), Base(tuple(tensors[count:]), formats[1])


def _products(
    tensors: Sequence[torch.Tensor],
    formats: tuple[Format | None, Format | None],
    matrices: Sequence[torch.Tensor | None],
    scaling: float,
    dtype: torch.dtype,
) -> tuple[GroupProduct, GroupProduct]:
    first, second = _bases(tensors, formats)
    a13, b13, a2, b2 = matrices
    return (
        GroupProduct(first, adapter_of(a13, b13, scaling), dtype),
        GroupProduct(second, adapter_of(a2, b2, scaling), dtype),
    )


def expert_mlp(
    x: torch.Tensor,
    probabilities: torch.Tensor,
    rows: list[int],
    bases: tuple[Base, Base],
    adapters: tuple[Adapter | None, Adapter | None],
) -> torch.Tensor:
    """W2 (silu(gate) * up * probability) with [gate; up] = W13 x of each group's own rows; both W with an adapter, or
    neither.

    Args: x [T, H]; probabilities [T] float32; rows: of x for each group, zeros allowed; bases: W13 [E, 2I, H] and
    W2 [E, H, I], which get no gradient.
    Returns: [T, H]. Gradients reach x, probabilities and the adapters (zeros where a group has no row).
    """
    if on_npu(x):
        # One call for all groups costs less there than launching kernels group by group.
        return grouped_expert_mlp(x, probabilities, rows, bases, adapters)
    first, second = bases
    matrices = [matrix for adapter in adapters for matrix in ((adapter.a, adapter.b) if adapter else (None, None))]
    scaling = 1.0 if adapters[0] is None else adapters[0].scaling
    return _ExpertMlp.apply(
        x, probabilities, *matrices, scaling, rows, (first.format, second.format), *first.tensors, *second.tensors
    )
