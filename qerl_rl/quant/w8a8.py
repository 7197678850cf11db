"""W8A8: int8 weights with one symmetric scale for each output channel; activations become int8 a token at a time.

The rounding is the compressed-tensors library's, so that vLLM, vLLM-Ascend and transformers read the same weights.
"""

from __future__ import annotations

import torch

from qerl_rl.quant.base import Part, Parts, library_scales
from qerl_rl.quant.integers import IntegerFormat


class W8A8(IntegerFormat):
    """A weight is about int8 * scale with scale = max |row| / 127.5 (a row of zeros gets the float32 epsilon)."""

    name, preset, group_size = "w8a8", "W8A8", 0
    parts = (Part("", torch.int8, 1), Part("_scale", torch.float32, 0))
    grid, ends = torch.arange(-128.0, 128.0), (-128, 127)

    def scales_of_groups(self, of_groups: torch.Tensor, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"_scale": library_scales(of_groups, self.scheme().weights)}

    def steps(self, parts: Parts) -> torch.Tensor:
        return parts["_scale"]

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """int8 times scale, multiplied in the scale's dtype, then rounded to `dtype`."""
        scale = parts["_scale"]
        return parts[""].to(scale.dtype).mul_(scale).to(dtype)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W8A8.quantize` of [..., N, K] as a pair: int8 [..., N, K] and scale [..., N, 1] float32."""
    parts = W8A8().quantize(weight)
    return parts[""], parts["_scale"]


def dequantize(quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """`W8A8.dequantize` of such a pair."""
    return W8A8().dequantize({"": quantized, "_scale": scale}, dtype)
