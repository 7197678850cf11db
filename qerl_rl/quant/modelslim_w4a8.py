"""W4A8_DYNAMIC: how msmodelslim stores int4 weights that meet int8 activations, and what vllm-ascend reads of it.

Sources: vllm-ascend 0.23.0, quantization/methods/w4a8.py; msmodelslim (July 2026), core/quant_service/modelslim_v1/save
and pytorch/llm_ptq/llm_ptq_tools/save. The matrix X.weight [N, K] is

    X.weight                 int8 [N / 2, K]: row 2i in the low half of a byte, row 2i + 1 in the high half
                             (descriptions without version 1.0.0: [N, K], a number a byte)
    X.weight_scale           float32 [N, 1]
    X.weight_scale_second    float32 [N, K / group_size], multiplied with it; absent for group_size 0
    X.weight_offset(_second) zeros of the same shapes: weights are symmetric
    X.scale_bias             float32 [N, 1], or [N, 16] where tensor parallelism cuts rows (down_proj, o_proj): 8 times
                             the sum of the weights of a row, or of a sixteenth of it (1.0.0 only)
"""

from __future__ import annotations

import re

import torch

from qerl_rl.quant.base import Index, Part, Parts
from qerl_rl.quant.int4 import W4A8

VERSION = "1.0.0"
"""Of a description whose weights have two rows in a byte."""
DEFAULT_GROUP_SIZE = 256
"""Of a description that names none."""
SIXTEENTHS = 16
"""Parts of a row with a bias of their own: as many as ranks may share it."""
_CUT_BY_COLUMNS = re.compile(r"\.(down_proj|o_proj|w2)\.weight$")


class W4A8Dynamic(W4A8):
    """W4A8 with float32 scales in memory, stored in msmodelslim's layout.

    In groups, vllm-ascend multiplies both scales and rounds the product to float16; so does what reads here, so that
    the trainer computes with the engine's weights. Products of 8 bits (bfloat16's) between 2**-17 and 65504 are exact.

    Args: rows_in_pairs: whether a byte holds two rows (version 1.0.0).
    """

    def __init__(self, group_size: int, rows_in_pairs: bool = True) -> None:
        super().__init__(group_size, torch.float32)
        self._rows_in_pairs = rows_in_pairs

    def with_scales(self, dtype: torch.dtype) -> W4A8Dynamic:
        return self

    def weight_shape(self, first: tuple[int, ...]) -> tuple[int, ...]:
        *outer, rows, width = first
        return (*outer, rows * 2 if self._rows_in_pairs else rows, width)

    def stored_in(self, part: Part) -> tuple[str, ...]:
        return ("_scale", "_scale_second") if part.suffix == "_scale" and self.group_size else (part.suffix,)

    def window(self, part: Part, rows: int, index: Index) -> tuple[Index, Index]:
        if part.suffix or not index:
            return super().window(part, rows, index)
        start, stop, _ = index[0].indices(rows)
        # From the byte of the first row to that of the last.
        first = start // 2
        return (slice(first, -(-stop // 2)), *index[1:]), (slice(start - 2 * first, stop - 2 * first),)

    def stored(self, parts: Parts) -> dict[str, torch.Tensor]:
        """All but the bias, which follows from the weight's name too: `scale_bias`."""
        weight, scale = parts[""], parts["_scale"].float()
        tensors = {"": pack_rows(weight) if self._rows_in_pairs else weight}
        if self.group_size:
            # With ones for rows the product is the scale of the group, whatever its bits.
            tensors |= {"_scale_second": scale, "_offset_second": torch.zeros_like(scale)}
            scale = torch.ones_like(scale[:, :1])
        return tensors | {"_scale": scale, "_offset": torch.zeros_like(scale)}

    def loaded(self, tensors: Parts) -> dict[str, torch.Tensor]:
        weight, scale = tensors[""].to(torch.int8), tensors["_scale"].float()
        if self.group_size:
            scale = engine_scales(scale * tensors["_scale_second"].float())
        return {"": unpack_rows(weight) if self._rows_in_pairs else weight, "_scale": scale}


def engine_scales(scale: torch.Tensor) -> torch.Tensor:
    """Float32 scales of groups as vllm-ascend's kernels get them: rounded to float16."""
    return scale.half().float()


def scale_bias(name: str, parts: Parts) -> torch.Tensor:
    """What the kernels add to outputs: they see int8 activations in halves, the lower of which less 8.

    Args: name: X.weight. parts: int8 [N, K] and float32 scales [N, K / group_size] or [N, 1].
    Returns: float32 [N, 1] or [N, 16]. Raises: ValueError where rows can't be cut into sixteenths.
    """
    return bias_of_rows(parts, SIXTEENTHS if _CUT_BY_COLUMNS.search(name) else 1)


def bias_of_rows(parts: Parts, pieces: int) -> torch.Tensor:
    """8 times the sum of each of so many pieces of a row: int8 [..., N, K] with scales -> float32 [..., N, pieces].

    Raises: ValueError where rows can't be cut so.
    """
    weight, scale = parts[""], parts["_scale"].float()
    if weight.shape[-1] % pieces:
        raise ValueError(f"rows of {weight.shape[-1]} weights can't be cut into {pieces}")
    products = (weight.float().unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)
    return 8 * products.unflatten(-1, (pieces, -1)).sum(-1)


def pack_rows(weight: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] between -8 and 7 -> int8 [N / 2, K]. Raises: ValueError for an odd N."""
    if weight.shape[0] % 2:
        raise ValueError(f"{weight.shape[0]} rows can't be stored in pairs")
    low, high = weight.unflatten(0, (-1, 2)).unbind(1)
    return (low & 15) | (high << 4)


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """int8 [N / 2, K] -> int8 [N, K]: shifting left and back again repeats the sign."""
    return torch.stack([(packed << 4) >> 4, packed >> 4], 1).flatten(0, 1)
