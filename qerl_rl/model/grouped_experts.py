"""Frozen experts with adapters where the device multiplies all groups in one call: what `expert_mlp` computes, without
its threads.

Of bfloat16 activations the device multiplies with int8 and int4 as they are stored (`_stored_product`), by the same
mathematics as `expert_mlp`: weights alone are quantized, so that log-probs get no bias. Other weights become floats of
all experts for one product, and again in backward: one matrix of a layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.model.base_weight import Base, Unpacker
from qerl_rl.model.grouped_linear import Adapter
from qerl_rl.platform.ops import (
    grouped_matmul,
    grouped_matmul_int4,
    grouped_matmul_int8_weights,
    repack_int4,
    swiglu,
)
from qerl_rl.quant.int4 import W4A16, W4A16Asymmetric


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
        if _is_int4(base, x.dtype):
            packed, scale = base.tensors
            return grouped_matmul_int4(x, repack_int4(packed), scale.transpose(1, 2).contiguous(), rows)
        scales = _scales(base, rows)
        if _is_int8(base, x.dtype):
            y = grouped_matmul_int8_weights(x, base.tensors[0], rows)
        else:
            y = grouped_matmul(x, _floats(base, x.dtype, rows), rows)
        return y if scales is None else (y * scales).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        base, rows, dtype = ctx.base, ctx.rows, gradient.dtype
        scales = _scales(base, rows)
        if scales is not None:
            gradient = (gradient * scales).to(dtype)
        if _is_int8(base, dtype):
            return grouped_matmul_int8_weights(gradient, base.tensors[0].transpose(1, 2), rows), None, None
        # Scales of groups of a row are not those of this product's columns, and a kernel has no others.
        return grouped_matmul(gradient, _floats(base, dtype, rows).transpose(1, 2), rows), None, None


def _is_int8(base: Base, dtype: torch.dtype) -> bool:
    """Whether the products take int8 in the order of the matrix, whose scales of rows stay outside."""
    plain = base.tensors[0].dtype == torch.int8 and base.tensors[0].shape[1:] == (base.outputs, base.inputs)
    return plain and base.row_scales is not None and dtype == torch.bfloat16


def _is_int4(base: Base, dtype: torch.dtype) -> bool:
    """Whether the product takes int4 with the stored scales of groups: of its own type, without zero points (the kernel
    has those for whole rows only)."""
    format = base.format
    fits = isinstance(format, W4A16) and not isinstance(format, W4A16Asymmetric) and format.group_size > 0
    return fits and dtype == torch.bfloat16 and base.tensors[1].dtype == dtype and base.outputs % 8 == 0


def _floats(base: Base, dtype: torch.dtype, rows: list[int]) -> torch.Tensor:
    """The weights [E, N, K] without their `row_scales`; those of experts without rows are left unwritten."""
    if base.format is None:
        return base.tensors[0]
    unpacker = Unpacker(base, dtype)
    weights = base.tensors[0].new_empty(len(rows), base.outputs, base.inputs, dtype=dtype)
    for group, count in enumerate(rows):
        if count:
            weights[group] = unpacker.matrix(group)
    return weights


def _scales(base: Base, rows: list[int]) -> torch.Tensor | None:
    """What products with the weights have to be multiplied by: [T, N] float32, or None."""
    scales = base.row_scales
    if scales is None:
        return None
    counts = torch.tensor(rows, device=scales.device)
    return torch.repeat_interleave(scales, counts, dim=0, output_size=sum(rows))
