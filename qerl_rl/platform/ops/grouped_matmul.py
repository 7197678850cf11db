"""Matrix products of a group of rows with the group's own matrix: the experts'."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.platform.ops.checks import on_npu, require, require_floats
from qerl_rl.platform.ops.selection import fused

SINGLE_OUTPUT = 2
BY_ROWS, BY_INNER = 0, 2
ENDS = 0
MOST_GROUPS = 1024


def grouped_matmul(x: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """y[t] = x[t] W[g]^T, where group g owns the next rows[g] rows of x.

    Args: x [T, K] float; weight [E, N, K] of its type; rows: one count a group, zeros allowed, whose sum is T.
    Returns: [T, N]. Gradients reach x and weight (zeros where a group has no row).
    Raises: ValueError when shapes, types or counts do not fit.
    torch_npu: npu_grouped_matmul([x], [weight^T], group_list=where each group ends, split_item=2, group_type=0) for
    both products by rows, group_type=2 (groups along the inner dimension) for the weight's gradient
    ("npu_grouped_matmul" in the API reference, aclnnGroupedMatmulV4). It has no gradient of its own.
    """
    require_floats("grouped_matmul", x=x, weight=weight)
    check_groups("grouped_matmul", x, weight.shape, 2, rows, weight=weight)
    return _GroupedMatmul.apply(x, weight, rows)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
        x_learns, weight_learns, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if weight_learns else None, weight if x_learns else None)
        ctx.rows = rows
        return by_rows(x, weight.transpose(1, 2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        grad_x = None if weight is None else by_rows(gradient, weight, ctx.rows)
        grad_weight = None if x is None else by_inner(gradient, x, ctx.rows)
        return grad_x, grad_weight, None


def by_rows(x: torch.Tensor, matrices: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """[T, N]: each group's rows of x [T, K] times its matrix of [E, K, N], which may be a transposed view.

    Elsewhere than on an NPU the matrices may be of another type: each is converted for its product.
    """
    if not len(x):
        return x.new_empty(0, matrices.shape[2])
    if fused("grouped_matmul", x):
        [y] = torch.ops.npu.npu_grouped_matmul(
            [x.contiguous()],
            [matrices],
            group_list=group_ends(rows, x.device),
            split_item=SINGLE_OUTPUT,
            group_type=BY_ROWS,
            group_list_type=ENDS,
        )
        return y
    parts = zip(x.split(rows), matrices, strict=True)
    return torch.cat([part @ matrix.to(x.dtype) for part, matrix in parts])


def by_inner(left: torch.Tensor, right: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """[E, N, K]: left^T right of each group's rows of left [T, N] and right [T, K]; zeros where there are none."""
    if fused("grouped_matmul", left) and len(left):
        [products] = torch.ops.npu.npu_grouped_matmul(
            [left.t()],
            [right.contiguous()],
            group_list=group_ends(rows, left.device),
            split_item=SINGLE_OUTPUT,
            group_type=BY_INNER,
            group_list_type=ENDS,
        )
        # The kernel need not write what has nothing to add up.
        idle = [group for group, count in enumerate(rows) if not count]
        if idle:
            products[idle] = 0.0
        return products
    if not len(left):
        return left.new_zeros(len(rows), left.shape[1], right.shape[1])
    return torch.stack([a.t() @ b for a, b in zip(left.split(rows), right.split(rows), strict=True)])


def group_ends(rows: list[int], device: torch.device) -> torch.Tensor:
    """int64 [E]: where each group ends. (As counts, the kernel refuses a single group.)"""
    return torch.tensor(list(accumulate(rows)), dtype=torch.int64, device=device)


def check_groups(
    operator: str, x: torch.Tensor, shape: torch.Size, inner: int, rows: list[int], **given: torch.Tensor
) -> None:
    """Raises: ValueError unless `shape` of the matrices has three dimensions, of which the first fits the counts and
    the dimension `inner` the columns of x."""
    fits = x.dim() == 2 and len(shape) == 3 and shape[inner] == x.shape[1]
    needed = f"x [T, K] and one matrix a group with K as dimension {inner}"
    require(fits, operator, needed, x=x, **given)
    counted = len(rows) == shape[0] and sum(rows) == len(x) and min(rows, default=0) >= 0
    require(counted, operator, "one count a matrix, whose sum is T", rows=rows, x=x, **given)
    few = not on_npu(x) or 0 < len(rows) <= MOST_GROUPS
    require(few, operator, f"1 to {MOST_GROUPS} groups", rows=rows, x=x, **given)
