"""4-bit floats (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), two in a byte: NVFP4 and MXFP4, weights only.

NVFP4 (NVIDIA): groups of 16 with e4m3 scales, which one float32 for the whole matrix divides. MXFP4 (OCP Microscaling
Formats 1.0): groups of 32 with powers of two (e8m0).
"""

from __future__ import annotations

import torch

from qerl_rl.quant.base import Format, Part, Parts, largest_of_groups, library_scales
from qerl_rl.quant.microscaling import exponents_of, powers_of_two
from qerl_rl.quant.nibbles import pack_nibbles, unpack_nibbles

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0


def _below(value: float) -> float:
    return torch.nextafter(torch.tensor(value), torch.tensor(0.0)).item()


# Midpoints between magnitudes; a tie goes to the even code, so every second one belongs to what is above it.
_LIMITS = torch.tensor([0.25, _below(0.75), 1.25, _below(1.75), 2.5, _below(3.5), 5.0])


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest e2m1; a negative number that becomes 0 keeps its sign, as the library has it."""
    magnitude = torch.bucketize(scaled.abs(), _LIMITS, out_int32=True)
    return (magnitude | (scaled < 0).to(torch.int32) << 3).to(torch.uint8)


class _Fp4(Format):
    grid = torch.cat([-MAGNITUDES.flip(0)[:-1], MAGNITUDES])
    _values = torch.cat([MAGNITUDES, -MAGNITUDES])

    def encode(self, weight: torch.Tensor, scales: Parts) -> dict[str, torch.Tensor]:
        steps = self.steps(scales)[..., None]
        groups = weight.detach().float().unflatten(-1, (steps.shape[-2], -1))
        return {"_packed": pack_nibbles(_codes(groups / steps).flatten(-2)), **scales}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        steps = self.steps(parts)[..., None]
        values = self._values[unpack_nibbles(parts["_packed"]).int()]
        # The library decompresses to bfloat16.
        return (values.unflatten(-1, (steps.shape[-2], -1)) * steps).flatten(-2).to(torch.bfloat16).to(dtype)


class Nvfp4(_Fp4):
    name, preset, group_size = "nvfp4", "NVFP4A16", 16
    parts = (
        Part("_packed", torch.uint8, 2),
        Part("_scale", torch.float8_e4m3fn, 16),
        Part("_global_scale", torch.float32, 0, per_matrix=True),
    )

    def scales(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        of_groups = largest_of_groups(weight, self.group_size)
        whole = of_groups.amax((-2, -1)) if largest is None else largest.float()
        # compressed-tensors' generate_gparam, for many matrices at once: the largest group gets the largest scale.
        whole = whole.clamp(min=torch.finfo(torch.float32).tiny)
        divisor = torch.nan_to_num(LARGEST_E4M3 * LARGEST_E2M1 / whole, nan=1.0, posinf=1.0)[..., None, None]
        scale = library_scales(of_groups, self.scheme().weights, divisor)
        return {
            "_scale": scale.to(torch.float8_e4m3fn),
            "_global_scale": divisor.expand(*of_groups.shape[:-1], 1).contiguous(),
        }

    def steps(self, parts: Parts) -> torch.Tensor:
        return parts["_scale"].float() / parts["_global_scale"]


class Mxfp4(_Fp4):
    name, preset, group_size = "mxfp4", "MXFP4A16", 32
    parts = (Part("_packed", torch.uint8, 2), Part("_scale", torch.uint8, 32))

    def scales(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"_scale": exponents_of(largest_of_groups(weight, self.group_size), LARGEST_E2M1)}

    def steps(self, parts: Parts) -> torch.Tensor:
        return powers_of_two(parts["_scale"])
