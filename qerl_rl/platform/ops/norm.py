"""RMSNorm."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import require
from qerl_rl.platform.ops.selection import fused


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32.

    Args: x [..., H] float; weight [H] of the same type, or of a wider one (with noise on it).
    Returns: [..., H] in the type of x. Gradients reach x and weight.
    Raises: ValueError when the weight does not fit.
    torch_npu: npu_rms_norm(input, gamma, epsilon) -> (y, rstd), whose gamma has the type of the input ("npu_rms_norm"
    in the Ascend Extension for PyTorch's API reference); its gradient is torch_npu's.
    """
    fits = weight.dim() == 1 and x.dim() > 0 and x.shape[-1] == weight.shape[0] and x.device == weight.device
    common = torch.promote_types(x.dtype, weight.dtype)
    require(
        fits and x.is_floating_point() and common == weight.dtype,
        "rms_norm",
        "x [..., H] and a weight [H] of its type or a wider one, on one device",
        x=x,
        weight=weight,
    )
    if fused("rms_norm", x):
        return torch.ops.npu.npu_rms_norm(x.to(common), weight, eps)[0].to(x.dtype)
    exact = x.float() if x.dtype != torch.float64 else x
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    # The weight may be of a wider type, with noise on it; the next layer takes its input's type.
    return (weight * exact.to(x.dtype)).to(x.dtype)
