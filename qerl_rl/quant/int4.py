"""int4 weights with a scale for each group of a row: W4A16 packs eight into an int32, W4A8 keeps each in a byte.

compressed-tensors stores the second unpacked, since its activations are quantized too (int8, a token at a time).
Scales of groups are bfloat16, as vLLM keeps them: what the trainer computes with is then what the engine does.
"""

from __future__ import annotations

import torch

from qerl_rl.platform import bfloat16_loops
from qerl_rl.quant.base import Format, Part, Parts, library_scales
from qerl_rl.quant.integers import IntegerFormat
from qerl_rl.quant.nibbles import look_up, pack_nibbles, table_of_pairs

_TABLES = {
    dtype: table_of_pairs(torch.arange(-8.0, 8.0).to(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float32)
}
"""What nibbles stand for, by the dtype of the scales."""


class _Int4(IntegerFormat):
    grid, ends = torch.arange(-8.0, 8.0), (-8, 7)

    def __init__(self, group_size: int, scale_dtype: torch.dtype | None = None) -> None:
        self.group_size = group_size
        # vLLM's and vLLM-Ascend's parameters for scales of whole rows are float32.
        self._scale_dtype = scale_dtype or (torch.bfloat16 if group_size else torch.float32)
        self._scale_part = Part("_scale", self._scale_dtype, group_size)

    def with_scales(self, dtype: torch.dtype) -> Format:
        return self if dtype == self._scale_dtype else type(self)(self.group_size, dtype)

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        arguments = self.scheme().weights
        arguments.scale_dtype = self._scale_dtype
        return {"_scale": library_scales(of_groups, arguments).to(self._scale_dtype)}

    def steps(self, parts: Parts) -> torch.Tensor:
        return parts["_scale"].float()

    def _multiplied(self, values: torch.Tensor, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Values [..., N, K] in the scale's dtype, which are overwritten, times their scales."""
        scale = parts["_scale"][..., None]
        return values.unflatten(-1, (scale.shape[-2], -1)).mul_(scale).flatten(-2).to(dtype)


class W4A16(_Int4):
    """Eight int4 in an int32, the first in the lowest bits, each plus 8 (pack-quantized)."""

    name, preset = "w4a16", "W4A16"

    def __init__(self, group_size: int, scale_dtype: torch.dtype | None = None) -> None:
        super().__init__(group_size, scale_dtype)
        self.parts = (Part("_packed", torch.int32, 8), self._scale_part)

    def _packed(self, integers: torch.Tensor) -> torch.Tensor:
        return pack_nibbles(integers.to(torch.int8).add_(8)).view(torch.int32)

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        packed, scale = parts["_packed"].contiguous().view(torch.uint8), parts["_scale"]
        if dtype == torch.bfloat16 and bfloat16_loops.has_loops(scale):
            return bfloat16_loops.multiply_int4(packed, scale.contiguous())
        return self._multiplied(look_up(packed, _TABLES[scale.dtype], scale.dtype), parts, dtype)

    def described(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {"_shape": torch.tensor(shape)}


class W4A16Asymmetric(W4A16):
    """W4A16 with an integer for each group that stands for 0: what AWQ makes. In memory, zero points are int8.

    A checkpoint packs those of eight rows into an int32.
    """

    preset = "W4A16_ASYM"
    grid = torch.arange(-15.0, 16.0)

    def __init__(self, group_size: int, scale_dtype: torch.dtype | None = None) -> None:
        super().__init__(group_size, scale_dtype)
        self.parts = (*self.parts, Part("_zero_point", torch.int8, group_size))

    def scales(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = weight.detach().float().unflatten(-1, (-1, self.group_size or weight.shape[-1]))
        arguments = self.scheme().weights
        arguments.scale_dtype = self._scale_dtype
        scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        return {"_scale": scale.to(self._scale_dtype), "_zero_point": zero_point}

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        raise TypeError(f"{self.preset} has zero points: they take both ends of each group, not the larger of them")

    def encode(self, weight: torch.Tensor, scales: Parts) -> dict[str, torch.Tensor]:
        steps = self.steps(scales)[..., None]
        scaled = weight.detach().float().unflatten(-1, (steps.shape[-2], -1)) / steps
        return {"_packed": self._rounded(scaled.add_(scales["_zero_point"][..., None])).flatten(-2), **scales}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        packed, scale = parts["_packed"].contiguous().view(torch.uint8), parts["_scale"][..., None]
        values = look_up(packed, _TABLES[scale.dtype], scale.dtype).unflatten(-1, (scale.shape[-2], -1))
        return values.sub_(parts["_zero_point"][..., None]).mul_(scale).flatten(-2).to(dtype)

    def stored(self, parts: Parts) -> dict[str, torch.Tensor]:
        codes = (parts["_zero_point"].T.contiguous() + 8).view(torch.uint8)
        return super().stored(parts) | {"_zero_point": pack_nibbles(codes).view(torch.int32).T.contiguous()}

    def loaded(self, tensors: Parts) -> dict[str, torch.Tensor]:
        packed = tensors["_zero_point"].T.contiguous().view(torch.uint8)
        zero_point = look_up(packed, _TABLES[torch.float32], torch.float32).to(torch.int8).T.contiguous()
        return super().loaded({**tensors, "_zero_point": zero_point})


class W4A8(_Int4):
    """An int4 in each int8 (int-quantized); activations become int8 a token at a time."""

    name, preset = "w4a8", "W4A8"

    def __init__(self, group_size: int, scale_dtype: torch.dtype | None = None) -> None:
        super().__init__(group_size, scale_dtype)
        self.parts = (Part("", torch.int8, 1), self._scale_part)

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._multiplied(parts[""].to(parts["_scale"].dtype, copy=True), parts, dtype)
