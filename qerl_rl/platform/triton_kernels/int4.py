"""int4 matrices: packed along their other dimension, and the experts of a few tokens in one launch.

Eight int4 share an int32, and no vector unit addresses half a byte. Both kernels therefore load words and shift them by
a last dimension of eight, which makes a row of words a row of numbers in its natural order (32 bytes of int32: the
alignment of Ascend's vector memory), instead of gathering each word eight times as a kernel for CUDA would. Neither
needs `tl.dot`, whose tiles of 16 rows a handful of tokens would leave empty, nor atomics, by which sums would depend on
who comes first, nor more than MOST_PROGRAMS programs (Ascend launches 65,535 at most).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MOST_PROGRAMS = 8192
ROW_BLOCK, WORD_BLOCK = 16, 32
"""Of `_repack`: words of the target's rows, words of the source's rows; 16 KB at a time."""
LARGEST_BLOCK = 64
"""Weights of a column, or columns of a slice, that a program of `_experts` takes at a time."""
DOWN_WORDS = 16
"""Words of a row of the second matrix at a time: with a slice of 64 columns 32 KB as floats, a sixth of what the vector
memory of an Ascend core holds."""


@triton.jit
def _repack(source, target, experts, outputs, words, row_block: tl.constexpr, word_block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tiles of 8 * row_block rows of word_block words, which become 8 * word_block rows of row_block words."""
    row_blocks = tl.cdiv(outputs // 8, row_block)
    word_blocks = tl.cdiv(words, word_block)
    eight = tl.arange(0, 8)
    for tile in range(tl.program_id(0), experts * row_blocks * word_blocks, tl.num_programs(0)):
        expert = (tile // (row_blocks * word_blocks)).to(tl.int64) * outputs * words
        row = tile // word_blocks % row_blocks * row_block + tl.arange(0, row_block)
        word = tile % word_blocks * word_block + tl.arange(0, word_block)
        inside = (row[:, None, None] < outputs // 8) & (word[None, None, :] < words)
        offsets = (row[:, None, None] * 8 + eight[None, :, None]) * words + word[None, None, :]
        # [rows / 8, 8, words]
        codes = tl.load(source + expert + offsets, mask=inside, other=0)
        written = (word[:, None] < words) & (row[None, :] < outputs // 8)
        for place in tl.static_range(8):
            # A code is 8 too large; turning its highest bit round gives its two's complement.
            packed = tl.sum((((codes >> (4 * place)) & 15) ^ 8) << (4 * eight)[None, :, None], axis=1)
            offsets = (word[:, None] * 8 + place) * (outputs // 8) + row[None, :]
            tl.store(target + expert + offsets, tl.trans(packed), mask=written)


def repack_int4(packed: torch.Tensor) -> torch.Tensor:
    """`platform.ops.repack_int4`: int32 [E, N, K / 8] -> int32 [E, K, N / 8]."""
    experts, outputs, words = packed.shape
    repacked = torch.empty(experts, words * 8, outputs // 8, dtype=torch.int32, device=packed.device)
    tiles = experts * triton.cdiv(outputs // 8, ROW_BLOCK) * triton.cdiv(words, WORD_BLOCK)
    if tiles:
        grid = (min(tiles, MOST_PROGRAMS),)
        source = packed.contiguous()
        _repack[grid](source, repacked, experts, outputs, words, row_block=ROW_BLOCK, word_block=WORD_BLOCK)
    return repacked


@triton.jit
def _numbers(words):  # type: ignore[no-untyped-def]
    """int32 [A, B] -> float32 [A, B, 8]: the eight int4 of each word, the first from its lowest bits."""
    codes = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
    return ((codes ^ 8) - 8).to(tl.float32)


@triton.jit
def _experts(  # type: ignore[no-untyped-def]
    x,
    chosen,
    probabilities,
    packed13,
    scale13,
    offset13,
    packed2,
    scale2,
    offset2,
    partial,
    k,
    slices,
    hidden: tl.constexpr,
    width: tl.constexpr,
    group13: tl.constexpr,
    group2: tl.constexpr,
    block: tl.constexpr,
    slice_words: tl.constexpr,
    down_words: tl.constexpr,
    has_offset13: tl.constexpr,
    has_offset2: tl.constexpr,
):
    """A program: a token, one of its experts, and a slice of the expert's intermediate columns.

    The slice's gate and up are complete here, so that SwiGLU follows at once, and its part of the down projection too:
    that is a sum over the slices. Nothing is handed from one program to another, and a single token of 8 experts still
    fills the cores.
    """
    pair = tl.program_id(0) // slices
    word = tl.program_id(0) % slices * slice_words + tl.arange(0, slice_words)
    expert = tl.load(chosen + pair)
    # Of an expert that is elsewhere nothing is read, and zeros are written.
    columns = tl.where(expert < 0, 0, width // 8)
    targets = tl.where(expert < 0, 0, hidden // 8)
    expert = tl.maximum(expert, 0).to(tl.int64)
    eight = tl.arange(0, 8)
    words13: tl.constexpr = width // 4
    words2: tl.constexpr = hidden // 8
    in_width = word < columns
    column = word[:, None] * 8 + eight[None, :]
    gate = tl.zeros((slice_words, 8), dtype=tl.float32)
    up = tl.zeros((slice_words, 8), dtype=tl.float32)
    first = packed13 + expert * hidden * words13
    groups13 = expert * (hidden // group13) * 2 * width
    for start in range(0, hidden, block):
        inner = start + tl.arange(0, block)
        token = tl.load(x + pair // k * hidden + inner, mask=inner < hidden, other=0.0).to(tl.float32)
        read = (inner[:, None] < hidden) & in_width[None, :]
        offsets = inner[:, None] * words13 + word[None, :]
        scales = groups13 + start // group13 * 2 * width + column
        gates = tl.sum(_numbers(tl.load(first + offsets, mask=read, other=0)) * token[:, None, None], axis=0)
        ups = tl.sum(_numbers(tl.load(first + offsets + width // 8, mask=read, other=0)) * token[:, None, None], axis=0)
        if has_offset13:
            total = tl.sum(token, axis=0)
            gates += total * tl.load(offset13 + scales, mask=in_width[:, None], other=0.0).to(tl.float32)
            ups += total * tl.load(offset13 + scales + width, mask=in_width[:, None], other=0.0).to(tl.float32)
        gate += gates * tl.load(scale13 + scales, mask=in_width[:, None], other=0.0).to(tl.float32)
        up += ups * tl.load(scale13 + scales + width, mask=in_width[:, None], other=0.0).to(tl.float32)
    # Where nothing was read, gate and up are zero, and so is this.
    active = gate / (1.0 + tl.exp(-gate)) * up * tl.load(probabilities + pair).to(tl.float32)
    row = tl.program_id(0) % slices * slice_words * 8 + tl.arange(0, slice_words * 8)
    active = tl.reshape(active, (slice_words * 8,))
    second = packed2 + expert * width * words2
    groups2 = expert * (width // group2) * hidden + tl.program_id(0) % slices * slice_words * 8 // group2 * hidden
    for start in range(0, words2, down_words):
        # (Triton wants a variable of a loop to keep its shape: `word` and `column` are taken.)
        target = start + tl.arange(0, down_words)
        inside = (row[:, None] < columns * 8) & (target[None, :] < targets)
        numbers = _numbers(tl.load(second + row[:, None] * words2 + target[None, :], mask=inside, other=0))
        sums = tl.sum(numbers * active[:, None, None], axis=0)
        outputs = target[:, None] * 8 + eight[None, :]
        scaled = target[:, None] < targets
        if has_offset2:
            offsets2 = tl.load(offset2 + groups2 + outputs, mask=scaled, other=0.0).to(tl.float32)
            sums += tl.sum(active, axis=0) * offsets2
        sums *= tl.load(scale2 + groups2 + outputs, mask=scaled, other=0.0).to(tl.float32)
        place = partial + tl.program_id(0).to(tl.int64) * hidden + outputs
        tl.store(place, sums, mask=target[:, None] < words2)


Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def decode_experts_int4(
    x: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor, gate_up: Packed, down: Packed
) -> torch.Tensor:
    """`platform.ops.decode_experts_int4`, whose matrices come as (packed, scale, offset) [E, ...]."""
    (tokens, hidden), k, width = x.shape, chosen.shape[1], down[0].shape[1]
    group13, group2 = hidden // gate_up[1].shape[1], width // down[1].shape[1]
    # A slice lies in one group of the second matrix, a block of rows in one of the first.
    slice_words = largest_block(group2, width) // 8
    slices = triton.cdiv(width // 8, slice_words)
    partial = torch.empty(tokens, k * slices, hidden, dtype=torch.float32, device=x.device)
    if not tokens:
        return torch.empty_like(x)
    _experts[(tokens * k * slices,)](
        x.contiguous(),
        chosen.int().contiguous(),
        probabilities.contiguous(),
        *_pointers(gate_up),
        *_pointers(down),
        partial,
        k,
        slices,
        hidden=hidden,
        width=width,
        group13=group13,
        group2=group2,
        block=largest_block(group13, hidden),
        slice_words=slice_words,
        down_words=DOWN_WORDS,
        has_offset13=gate_up[2] is not None,
        has_offset2=down[2] is not None,
    )
    return partial.sum(1).to(x.dtype)


def largest_block(group: int, length: int) -> int:
    """The largest power of two up to LARGEST_BLOCK that divides a group (whole rows have a ragged end: any will do)."""
    return LARGEST_BLOCK if group == length else min(group & -group, LARGEST_BLOCK)


def _pointers(matrices: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed, scale, offset = matrices
    # A pointer that is never followed.
    return packed.contiguous(), scale.contiguous(), scale if offset is None else offset.contiguous()
