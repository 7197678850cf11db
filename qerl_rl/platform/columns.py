"""Matrices [T, N] times one float32 number for each column, as the scales of quantized rows are applied to outputs."""

from __future__ import annotations

import torch

from qerl_rl.platform import bfloat16_loops


def scale_columns(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` = matrix * scales, rounded once; it is not the matrix."""
    if bfloat16_loops.has_loops(matrix):
        return bfloat16_loops.scale_columns(matrix, scales, out)
    return torch.mul(matrix, scales, out=out)
