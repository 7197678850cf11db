"""4-bit floats (e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign), two in a byte: NVFP4 and MXFP4, weights only.

NVFP4 (NVIDIA): groups of 16 with e4m3 scales, which one float32 for the whole matrix divides. MXFP4 (OCP Microscaling
Formats 1.0): groups of 32 with powers of two (e8m0).
"""

from __future__ import annotations

import torch

from qerl_rl.quant.base import Format, Part, Parts, library_scales
from qerl_rl.quant.microscaling import exponents_of, powers_of_two
from qerl_rl.quant.nibbles import look_up, pack_nibbles, table_of_pairs

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0


def _codes(scaled: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest e2m1, ties to even; what a negative number becomes is negative, even 0 (as there).

    The code of a magnitude is its multiple of 1/2 up to 2, its integer + 2 up to 4, its half + 4 up to 6, and elsewhere
    each of the three is larger: it is their minimum, also after rounding. Floats around 3 * 2^(n - 1) lie 2^(n - 23)
    apart, so that adding such a number rounds to multiples of that, and leaves the multiple in the lowest bits.
    """
    sign = scaled.sign().to(torch.int8).bitwise_and_(8)
    magnitude = scaled.abs_().clamp_(max=LARGEST_E2M1)
    halves, integers, twos = ((magnitude + 3.0 * 2.0**power).view(torch.int32).to(torch.int8) for power in (21, 22, 23))
    codes = torch.minimum(halves, torch.minimum(integers.add_(2), twos.add_(4)))
    return codes.bitwise_or_(sign).view(torch.uint8)


class _Fp4(Format):
    grid = torch.cat([-MAGNITUDES.flip(0)[:-1], MAGNITUDES])
    _table = table_of_pairs(torch.cat([MAGNITUDES, -MAGNITUDES]))

    def _rounded(self, scaled: torch.Tensor) -> torch.Tensor:
        return pack_nibbles(_codes(scaled))

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        steps = self.steps(parts)[..., None]
        values = look_up(parts["_packed"], self._table, torch.float32).unflatten(-1, (steps.shape[-2], -1))
        # The library decompresses to bfloat16.
        return values.mul_(steps).flatten(-2).to(torch.bfloat16).to(dtype)


class Nvfp4(_Fp4):
    name, preset, group_size = "nvfp4", "NVFP4A16", 16
    parts = (
        Part("_packed", torch.uint8, 2),
        Part("_scale", torch.float8_e4m3fn, 16),
        Part("_global_scale", torch.float32, 0, per_matrix=True),
    )

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
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

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"_scale": exponents_of(of_groups, LARGEST_E2M1)}

    def steps(self, parts: Parts) -> torch.Tensor:
        return powers_of_two(parts["_scale"])
