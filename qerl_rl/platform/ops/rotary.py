"""Rotary position embedding."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import require, require_floats
from qerl_rl.platform.ops.selection import fused

WIDEST_HEAD = 896
"""Head dimensions from this one on are refused by the kernel."""


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotated(x) * sin, where rotated((a, b)) is (-b, a) of the two halves of the last dimension.

    Args: x [S, B, N, D]; cos and sin [S, 1 or B, 1 or N, D], all of one floating-point type.
    Returns: [S, B, N, D]. Gradients reach x, and cos and sin where they ask for them.
    Raises: ValueError when shapes or types do not fit, or D is odd or (on an NPU) 896 or more.
    torch_npu: npu_rotary_mul(input, r1, r2, rotary_mode="half"), layout SBND ("npu_rotary_mul" in the API reference);
    its gradient is torch_npu's.
    """
    require_floats("rotary", x=x, cos=cos, sin=sin)
    fits = x.dim() == 4 and cos.dim() == 4 and cos.shape == sin.shape and x.shape[-1] % 2 == 0
    fits = fits and (cos.shape[0], cos.shape[3]) == (x.shape[0], x.shape[3])
    fits = fits and cos.shape[1] in (1, x.shape[1]) and cos.shape[2] in (1, x.shape[2])
    needed = "x [S, B, N, D] with an even D, cos and sin [S, 1 or B, 1 or N, D]"
    require(fits, "rotary", needed, x=x, cos=cos, sin=sin)
    if fused("rotary", x):
        require(x.shape[3] < WIDEST_HEAD, "rotary", f"heads narrower than {WIDEST_HEAD}", x=x)
        return torch.ops.npu.npu_rotary_mul(x, cos, sin)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
