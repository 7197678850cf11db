"""Scales that are powers of two (e8m0: an exponent plus 127 in a byte), and MXFP8 on them.

OCP Microscaling Formats 1.0; which power of two a group gets is compressed-tensors' choice.
"""

from __future__ import annotations

import math

import torch

from qerl_rl.quant.base import Format, Part, Parts


def exponents_of(largest: torch.Tensor, largest_value: float) -> torch.Tensor:
    """e8m0 scales (uint8) of groups with these largest magnitudes (float32), for numbers up to `largest_value`.

    The power of two at or below `largest`, or the next where `largest` is within 1/8 of it, becomes the power of two
    at or below `largest_value`.
    """
    bits = largest.view(torch.int32)
    exponent = (bits + (1 << 21)) >> 23
    return (exponent - math.floor(math.log2(largest_value))).clamp_(min=0).to(torch.uint8)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """float32 2^(e - 127) of e8m0 numbers."""
    # The exponent's own bits; 2^-127 is the one that has no exponent left and half a mantissa.
    return (exponents.int() << 23).clamp_(min=1 << 22).view(torch.float32)


class Mxfp8(Format):
    """8-bit floats (e4m3) in groups of 32 with powers of two, weights only."""

    name, preset, group_size = "mxfp8", "MXFP8A16", 32
    parts = (Part("", torch.float8_e4m3fn, 1), Part("_scale", torch.uint8, 32))
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0).unique()
    largest_value = 448.0

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"_scale": exponents_of(of_groups, self.largest_value)}

    def _rounded(self, scaled: torch.Tensor) -> torch.Tensor:
        # Adding 0 takes the sign from a 0, as the library's adding of its zero point does.
        return scaled.add_(0.0).clamp_(-self.largest_value, self.largest_value).to(torch.float8_e4m3fn)

    def steps(self, parts: Parts) -> torch.Tensor:
        return powers_of_two(parts["_scale"])

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        steps = self.steps(parts)[..., None]
        values = parts[""].float().unflatten(-1, (steps.shape[-2], -1))
        # The library decompresses to bfloat16.
        return (values * steps).flatten(-2).to(torch.bfloat16).to(dtype)
