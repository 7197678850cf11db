"""Products that torch computes several times faster by another name on one kind of device."""

from __future__ import annotations

import torch


class ColumnScaler:
    """Multiplies the columns of [T, N] matrices by float32 numbers [N], rounding once.

    Of a mixed product, torch's CPU kernels make a float32 copy of the matrix, and round another; batch normalization
    with mean 0 and variance 1 is the same product in one pass, a quarter of the time.
    """

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._one_pass = dtype == torch.bfloat16 and device.type == "cpu"
        self._zeros, self._ones, self._unused = torch.zeros(columns), torch.ones(columns), torch.empty(0)

    def __call__(self, matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`out` = matrix * scales; it may be the matrix itself."""
        if not self._one_pass:
            return torch.mul(matrix, scales, out=out)
        torch.ops.aten.native_batch_norm.out(
            matrix,
            scales,
            None,
            self._zeros,
            self._ones,
            False,  # Not training: the mean and variance are those given.
            0.0,
            0.0,
            out=out,
            save_mean=self._unused,
            save_invstd=self._unused,
        )
        return out
