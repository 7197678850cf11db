"""The memory format in which Ascend's matrix unit reads weights fastest."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import on_npu, require

FRACTAL_NZ = 29


def to_fractal_nz(weight: torch.Tensor) -> torch.Tensor:
    """The same matrices in blocks of 16 rows and 32 bytes; elsewhere than on an NPU `weight` itself.

    Shapes and values stay what they were, but writing into the result element by element is not possible: change the
    weight and cast again.
    Args: weight [..., K, N]. No gradient. Raises: ValueError for a vector.
    torch_npu: npu_format_cast(input, acl_format) with 29, FRACTAL_NZ ("npu_format_cast" in the API reference).
    """
    require(weight.dim() >= 2, "to_fractal_nz", "matrices [..., K, N]", weight=weight)
    return torch.ops.npu.npu_format_cast(weight.detach(), FRACTAL_NZ) if on_npu(weight) else weight
