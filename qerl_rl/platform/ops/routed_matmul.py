"""Products of routed tokens with their experts' matrices where the counts are on the device: nothing waits for them.

A graph can be captured around them. They are for engines: no gradient.
"""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import on_npu, require, require_floats
from qerl_rl.platform.ops.grouped_matmul import BY_ROWS, ENDS, SINGLE_OUTPUT


def routed_matmul(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """y[t] = x[t] M[g], where group g owns the rows of x before ends[g] that no group before it owns.

    Args: x [T, K] float; matrices [E, K, N] of its type, transposed views too; ends int64 [E], ascending, T at most.
    Returns: [T, N]; in rows of no group zeros, on an NPU anything.
    Raises: ValueError when shapes or types do not fit.
    torch_npu: npu_grouped_matmul([x], [M], group_list=ends, split_item=2, group_type=0) ("npu_grouped_matmul" in the
    API reference).
    """
    require_floats("routed_matmul", x=x, matrices=matrices)
    _check("routed_matmul", x, matrices, ends)
    if on_npu(x):
        [y] = torch.ops.npu.npu_grouped_matmul(
            [x.contiguous()],
            [matrices],
            group_list=ends,
            split_item=SINGLE_OUTPUT,
            group_type=BY_ROWS,
            group_list_type=ENDS,
        )
        return y
    return _by_rows(x, matrices, ends)


def routed_matmul_int8(
    x: torch.Tensor, x_scale: torch.Tensor, matrices: torch.Tensor, scale: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """y[t] = (x[t] M[g]) * scale[g] * x_scale[t], with the groups of `routed_matmul`.

    Args: x int8 [T, K] with x_scale float32 [T]; matrices int8 [E, K, N], as an engine keeps them (also in FRACTAL_NZ),
    with scale bfloat16 [E, N]; ends int64 [E].
    Returns: bfloat16 [T, N]; in rows of no group zeros, on an NPU anything.
    Raises: ValueError when shapes or types do not fit.
    torch_npu: npu_grouped_matmul(..., scale=, per_token_scale=, output_dtype=), as in `grouped_matmul_int8`.
    """
    _check("routed_matmul_int8", x, matrices, ends)
    types = x.dtype == matrices.dtype == torch.int8 and x_scale.dtype == torch.float32 and scale.dtype == torch.bfloat16
    shapes = x_scale.shape == x.shape[:1] and scale.shape == (len(matrices), matrices.shape[2])
    needed = "int8 x and matrices, float32 x_scale [T], bfloat16 scale [E, N]"
    require(types and shapes, "routed_matmul_int8", needed, x=x, matrices=matrices, x_scale=x_scale, scale=scale)
    if on_npu(x):
        [y] = torch.ops.npu.npu_grouped_matmul(
            [x.contiguous()],
            [matrices],
            scale=[scale],
            per_token_scale=[x_scale],
            group_list=ends,
            split_item=SINGLE_OUTPUT,
            group_type=BY_ROWS,
            group_list_type=ENDS,
            output_dtype=torch.bfloat16,
        )
        return y
    # Sums of products of int8 are exact in float64.
    sums = _by_rows(x.double(), matrices.double(), ends).float()
    columns = _by_rows(torch.ones(len(x), 1), scale.float()[:, None], ends)
    return (sums * columns * x_scale[:, None]).to(torch.bfloat16)


def _by_rows(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(len(x), matrices.shape[2])
    start = 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        y[start:end] = x[start:end] @ matrix
        start = end
    return y


def _check(operator: str, x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> None:
    fits = x.dim() == 2 and matrices.dim() == 3 and matrices.shape[1] == x.shape[1]
    fits = fits and ends.shape == matrices.shape[:1] and ends.dtype == torch.int64
    needed = "x [T, K], one matrix [K, N] a group and int64 ends [E]"
    require(fits, operator, needed, x=x, matrices=matrices, ends=ends)
