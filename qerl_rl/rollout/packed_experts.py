"""The order in which vLLM's CPU kernels keep quantized experts, and how it is read without a second copy.

Found by packing tensors of known numbers; tests pack random ones and compare all bytes.
"""

from __future__ import annotations

import torch

from qerl_rl.quant.base import Parts
from qerl_rl.quant.w8a8 import W8A8

ROWS, COLUMNS = 32, 4
"""Of a tile of the int8 kernel: the numbers of 32 rows lie together, four of a row at a time (an int32 for VNNI)."""


class PackedW8A8(W8A8):
    """W8A8 whose int8 the fused expert kernel has packed: its first tensor is what `int8_tiles` gives."""

    def matrix_shape(self, first: torch.Tensor) -> tuple[int, int]:
        _, tiles, rows, columns = first.shape
        return tiles * rows, columns * COLUMNS

    def unpacked(self, parts: Parts, scratch: torch.Tensor | None = None) -> Parts:
        tiles = parts[""]
        tile, rows, columns = tiles.shape
        if scratch is None:
            scratch = torch.empty(tile * rows, columns * COLUMNS, dtype=torch.int8)
        # Four numbers move as one: a copy of int8 would move each by itself, which takes three times as long.
        scratch.view(torch.int32).view(tiles.shape).copy_(tiles)
        return {**parts, "": scratch}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return super().dequantize(self.unpacked(parts), dtype)


def int8_tiles(packed: torch.Tensor) -> torch.Tensor:
    """The weights of experts in the order of the matrix, a view of their packed form.

    Args: packed: contiguous int8 [E, N, K + 4] as torch.ops._C.convert_weight_packed makes it. Each 32 rows are one run
        of memory: int8 [K / 4, 32, 4], then an int32 for each row (128 times its sum, for activations made unsigned).
    Returns: int32 [E, N / 32, 32, K / 4], each four int8 of a row.
    """
    experts, rows, stored = packed.shape
    columns = stored - COLUMNS
    runs = packed.detach().view(experts, rows // ROWS, ROWS * stored)[..., : ROWS * columns]
    return runs.view(torch.int32).unflatten(-1, (columns // COLUMNS, ROWS)).transpose(2, 3)
