"""Two 4-bit codes in a byte: the first of a pair in the low half, as in every format of compressed-tensors."""

from __future__ import annotations

import torch

_AS_INTEGER = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] below 16, contiguous -> uint8 [..., K / 2]; K is even."""
    pairs = codes.view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def table_of_pairs(values: torch.Tensor) -> torch.Tensor:
    """For `look_up`: the two values of each byte side by side, as one integer.

    Args: values [16], of 2 or 4 bytes each.
    """
    low, high = torch.arange(256) & 15, torch.arange(256) >> 4
    return torch.stack([values[low], values[high]], -1).view(_AS_INTEGER[values.dtype]).flatten()


def look_up(packed: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., K / 2] -> [..., K] of `dtype`: the value of each code, by the table of values of that dtype."""
    pairs = torch.index_select(table.to(packed.device), 0, packed.flatten().int())
    return pairs.view(dtype).view(*packed.shape[:-1], -1)
