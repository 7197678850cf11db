"""int8 activations with a scale a token, and int4 weights packed into int32."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import on_npu, require

INT4_IN_INT32 = 8
INT8_LARGEST = 127


def dynamic_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row of x as integers: x is about int8 * scale with scale = max |row| / 127.

    Args: x [..., H] float (16 bits on an NPU), of two dimensions or more.
    Returns: int8 [..., H], rounded to the nearest, and scale float32 [...]; a row of zeros is zeros with scale 0. No
    gradient.
    Raises: ValueError for another shape or type.
    torch_npu: npu_dynamic_quant(input) -> (y, scale) ("npu_dynamic_quant" in the API reference).
    """
    types = (torch.float16, torch.bfloat16) if on_npu(x) else (torch.float16, torch.bfloat16, torch.float32)
    require(x.dim() >= 2 and x.dtype in types, "dynamic_quantize", "floats [..., H], of 16 bits on an NPU", x=x)
    if on_npu(x):
        return torch.ops.npu.npu_dynamic_quant(x.detach())
    exact = x.detach().float()
    scale = exact.abs().amax(-1) / INT8_LARGEST
    # Whatever a row of zeros is divided by, it stays one.
    return (exact / torch.where(scale == 0, 1.0, scale)[..., None]).round().to(torch.int8), scale


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """Eight neighbours of the last dimension in an int32, the first in the lowest bits.

    Args: values int32 [..., N] between -8 and 7, N a multiple of 8.
    Returns: int32 [..., N / 8].
    Raises: ValueError for another shape or type.
    torch_npu: npu_convert_weight_to_int4pack(weight) of a matrix ("npu_convert_weight_to_int4pack" in the API
    reference).
    """
    fits = values.dim() >= 2 and values.shape[-1] % INT4_IN_INT32 == 0 and values.dtype == torch.int32
    require(fits, "pack_int4", "int32 [..., N] with N a multiple of 8", values=values)
    if on_npu(values):
        matrix = values.reshape(-1, values.shape[-1]).contiguous()
        return torch.ops.npu.npu_convert_weight_to_int4pack(matrix).view(*values.shape[:-1], -1)
    codes = (values & 15).unflatten(-1, (-1, INT4_IN_INT32)).long()
    whole = (codes << _shifts(values)).sum(-1)
    # The largest code of all may set the bit of the sign.
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """What `pack_int4` packed: int32 [..., N / 8] -> int8 [..., N]. Raises: ValueError for another type."""
    require(packed.dtype == torch.int32, "unpack_int4", "int32", packed=packed)
    # Shifted up to the sign first, so that shifting down extends it.
    lifted = packed[..., None] << (28 - _shifts(packed)).int()
    return (lifted >> 28).to(torch.int8).flatten(-2)


def _shifts(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 32, 4, device=like.device)
