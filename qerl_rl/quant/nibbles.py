"""Two 4-bit codes in a byte: the first of a pair in the low half, as in every format of compressed-tensors."""

from __future__ import annotations

import torch


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K] below 16 -> uint8 [..., K / 2]; K is even."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs | (pairs >> 4)).to(torch.uint8)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K / 2] -> uint8 [..., K] below 16."""
    pairs = packed.to(torch.int16)
    return ((pairs | (pairs << 4)) & 0x0F0F).view(torch.uint8)
