"""Grouped products with quantized matrices: int8 times int8 with a scale a token, floats times int8, floats times
int4."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.platform.ops.checks import require
from qerl_rl.platform.ops.grouped_matmul import BY_ROWS, ENDS, SINGLE_OUTPUT, by_rows, check_groups, group_ends
from qerl_rl.platform.ops.quantize import INT4_IN_INT32, unpack_int4
from qerl_rl.platform.ops.selection import fused

_OUTPUT = {torch.bfloat16: torch.bfloat16, torch.float32: torch.float16}
"""The type of the result, by that of the weights' scales: the combinations that the kernel has."""


def grouped_matmul_int8(
    x: torch.Tensor, x_scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, rows: list[int]
) -> torch.Tensor:
    """y[t] = (x[t] W[g]^T) * weight_scale[g] * x_scale[t], where group g owns the next rows[g] rows of x.

    Args: x int8 [T, K] with x_scale float32 [T] (`dynamic_quantize`); weight int8 [E, N, K] with weight_scale [E, N]
    bfloat16, or float32; rows: one count a group, zeros allowed.
    Returns: [T, N] bfloat16, or float16 where weight_scale is float32. No gradient: the inputs are integers.
    Raises: ValueError when shapes, types or counts do not fit.
    torch_npu: npu_grouped_matmul(..., scale=, per_token_scale=, output_dtype=), per-token quantization of the table of
    types in the API reference.
    """
    given = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale}
    check_groups("grouped_matmul_int8", x, weight.shape, 2, rows, weight=weight)
    types = x.dtype == weight.dtype == torch.int8 and x_scale.dtype == torch.float32 and weight_scale.dtype in _OUTPUT
    shapes = x_scale.shape == x.shape[:1] and weight_scale.shape == weight.shape[:2]
    needed = "int8 x [T, K] and weight [E, N, K], float32 x_scale [T], bfloat16 or float32 weight_scale [E, N]"
    require(types and shapes, "grouped_matmul_int8", needed, **given)
    dtype = _OUTPUT[weight_scale.dtype]
    if not len(x):
        return x.new_empty(0, weight.shape[1], dtype=dtype)
    if fused("grouped_matmul", x):
        [y] = torch.ops.npu.npu_grouped_matmul(
            [x.contiguous()],
            [weight.transpose(1, 2)],
            scale=[weight_scale],
            per_token_scale=[x_scale],
            group_list=group_ends(rows, x.device),
            split_item=SINGLE_OUTPUT,
            group_type=BY_ROWS,
            group_list_type=ENDS,
            output_dtype=dtype,
        )
        return y
    # Sums of products of int8 are exact in float64.
    sums = by_rows(x.double(), weight.transpose(1, 2).double(), rows).float()
    scales = torch.repeat_interleave(weight_scale.float(), torch.tensor(rows), dim=0)
    return (sums * scales * x_scale[:, None]).to(dtype)


def grouped_matmul_int8_weights(x: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """y[t] = x[t] W[g]^T with the integers as they are, where group g owns the next rows[g] rows of x.

    Scales stay outside, for the caller to multiply the outputs by in float32: the kernel takes them in the type of x
    only, and a scale rounded to bfloat16 would put all outputs of a column off by one factor.
    Args: x bfloat16 [T, K] (sums of integers leave the range of float16); weight int8 [E, N, K]; rows: one count a
    group, zeros allowed.
    Returns: [T, N] bfloat16. A gradient reaches x, by the same kernel.
    Raises: ValueError when shapes, types or counts do not fit.
    torch_npu: npu_grouped_matmul(..., antiquant_scale=ones, antiquant_offset=zeros), pseudo-quantization with int8
    weights, one scale a column (aclnnGroupedMatmulV4), whose weights may be transposed.
    """
    check_groups("grouped_matmul_int8_weights", x, weight.shape, 2, rows, weight=weight)
    types = x.dtype == torch.bfloat16 and weight.dtype == torch.int8
    require(types, "grouped_matmul_int8_weights", "bfloat16 x [T, K], int8 weight [E, N, K]", x=x, weight=weight)
    return _GroupedMatmulInt8Weights.apply(x, weight, rows)


class _GroupedMatmulInt8Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.rows = rows
        return _int8_by_rows(x, weight.transpose(1, 2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        [weight] = ctx.saved_tensors
        return _int8_by_rows(gradient.contiguous(), weight, ctx.rows), None, None


def _int8_by_rows(x: torch.Tensor, matrices: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`by_rows` with int8 matrices [E, K, N]."""
    if not fused("grouped_matmul", x) or not len(x):
        return by_rows(x, matrices, rows)
    ones = x.new_ones(matrices.shape[0], matrices.shape[2])
    [y] = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [matrices],
        antiquant_scale=[ones],
        antiquant_offset=[torch.zeros_like(ones)],
        group_list=group_ends(rows, x.device),
        split_item=SINGLE_OUTPUT,
        group_type=BY_ROWS,
        group_list_type=ENDS,
    )
    return y


def grouped_matmul_int4(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    rows: list[int],
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t] = x[t] ((W[g] + offset[g]) * scale[g]), where group g owns the next rows[g] rows of x.

    Args: x bfloat16 or float16 [T, K]; packed int32 [E, K, N / 8] (`pack_int4`); scale and offset [E, K / s, N] in the
    type of x: one for s neighbours along K; rows: one count a group, zeros allowed.
    Returns: [T, N] in the type of x. A gradient reaches x.
    Raises: ValueError when shapes, types or counts do not fit.
    torch_npu: npu_grouped_matmul(..., antiquant_scale=, antiquant_offset=) with int4 in int32 ("pseudo-quantization" in
    the API reference); the gradient unpacks the weights for one plain grouped product.
    """
    given = {"x": x, "packed": packed, "scale": scale} | ({} if offset is None else {"offset": offset})
    check_groups("grouped_matmul_int4", x, packed.shape, 1, rows, packed=packed)
    types = packed.dtype == torch.int32 and x.dtype in (torch.float16, torch.bfloat16)
    types = types and all(each.dtype == x.dtype for each in (scale, offset) if each is not None)
    shapes = scale.dim() == 3 and scale.shape[::2] == (len(packed), packed.shape[2] * INT4_IN_INT32)
    shapes = shapes and 0 < scale.shape[1] <= x.shape[1] and x.shape[1] % scale.shape[1] == 0
    shapes = shapes and (offset is None or offset.shape == scale.shape)
    needed = "16-bit x [T, K], int32 packed [E, K, N / 8], scale (and offset) [E, K / s, N] in the type of x"
    require(types and shapes, "grouped_matmul_int4", needed, **given)
    return _GroupedMatmulInt4.apply(x, packed, scale, torch.zeros_like(scale) if offset is None else offset, rows)


class _GroupedMatmulInt4(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, rows: list[int]
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scale, offset)
        ctx.rows = rows
        if not fused("grouped_matmul", x) or not len(x):
            return by_rows(x, _dequantized(packed, scale, offset), rows)
        # One scale a column has no dimension of groups.
        whole_columns = scale.shape[1] == 1
        [y] = torch.ops.npu.npu_grouped_matmul(
            [x.contiguous()],
            [packed],
            antiquant_scale=[scale.squeeze(1) if whole_columns else scale],
            antiquant_offset=[offset.squeeze(1) if whole_columns else offset],
            group_list=group_ends(rows, x.device),
            split_item=SINGLE_OUTPUT,
            group_type=BY_ROWS,
            group_list_type=ENDS,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        matrices = _dequantized(*ctx.saved_tensors)
        return by_rows(gradient.contiguous(), matrices.transpose(1, 2), ctx.rows), None, None, None, None


def _dequantized(packed: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """[E, K, N] in the type of scale."""
    values = unpack_int4(packed).to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    return values.add_(offset[:, :, None]).mul_(scale[:, :, None]).flatten(1, 2)
