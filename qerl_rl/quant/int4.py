"""int4 weights with a scale for each group of a row: W4A16 packs eight into an int32, W4A8 keeps each in a byte.

compressed-tensors stores the second unpacked, since its activations are quantized too (int8, a token at a time).
Scales of groups are bfloat16, as vLLM keeps them: what the trainer computes with is then what the engine does.
"""

from __future__ import annotations

import torch

from qerl_rl.quant.base import Format, Part, Parts, largest_of_groups, library_scales
from qerl_rl.quant.nibbles import pack_nibbles, unpack_nibbles

DEFAULT_GROUP = 128


class _Int4(Format):
    grid = torch.arange(-8.0, 8.0)

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        # vLLM's and vLLM-Ascend's parameters for scales of whole rows are float32.
        self._scale_dtype = torch.bfloat16 if group_size else torch.float32
        self._scale_part = Part("_scale", self._scale_dtype, group_size)

    def scales(self, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        arguments = self.scheme().weights
        arguments.scale_dtype = self._scale_dtype
        of_groups = library_scales(largest_of_groups(weight, self.group_size), arguments)
        return {"_scale": of_groups.to(self._scale_dtype)}

    def steps(self, parts: Parts) -> torch.Tensor:
        return parts["_scale"].float()

    def _rounded(self, weight: torch.Tensor, scales: Parts) -> torch.Tensor:
        """int8 [..., N, K] from -8 to 7."""
        steps = self.steps(scales)[..., None]
        groups = weight.detach().float().unflatten(-1, (steps.shape[-2], -1))
        return groups.div(steps).round_().clamp_(-8, 7).to(torch.int8).flatten(-2)

    def _multiplied(self, rounded: torch.Tensor, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        scale = parts["_scale"][..., None]
        groups = rounded.unflatten(-1, (scale.shape[-2], -1)).to(scale.dtype)
        return groups.mul_(scale).flatten(-2).to(dtype)


class W4A16(_Int4):
    """Eight int4 in an int32, the first in the lowest bits, each plus 8 (pack-quantized)."""

    name, preset = "w4a16", "W4A16"

    def __init__(self, group_size: int) -> None:
        super().__init__(group_size)
        self.parts = (Part("_packed", torch.int32, 8), self._scale_part)

    def encode(self, weight: torch.Tensor, scales: Parts) -> dict[str, torch.Tensor]:
        codes = (self._rounded(weight, scales) + 8).view(torch.uint8)
        return {"_packed": pack_nibbles(codes).view(torch.int32), **scales}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        codes = unpack_nibbles(parts["_packed"].contiguous().view(torch.uint8)).view(torch.int8)
        return self._multiplied(codes - 8, parts, dtype)

    def described(self, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
        return {"_shape": torch.tensor(shape)}


class W4A8(_Int4):
    """An int4 in each int8 (int-quantized); activations become int8 a token at a time."""

    name, preset = "w4a8", "W4A8"

    def __init__(self, group_size: int) -> None:
        super().__init__(group_size)
        self.parts = (Part("", torch.int8, 1), self._scale_part)

    def encode(self, weight: torch.Tensor, scales: Parts) -> dict[str, torch.Tensor]:
        return {"": self._rounded(weight, scales), **scales}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._multiplied(parts[""], parts, dtype)
