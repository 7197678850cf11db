"""Experts in int8 on AMX tiles: loops over the packed weights of vLLM's CPU kernels, an adapter inside each expert.

What a row gets does not depend on the rows beside it: sums of int8 products are exact, and all else goes row by row.
Weights are read where they lie (`packed_experts.py` says in which order), 32 rows of a matrix at a time: a block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy import float32, int8, int32, int64, uint16, uint32, uintp

from qerl_rl.platform.amx import add_product, add_product_bfloat16, configure, load, prefetch, release, store, zero
from qerl_rl.platform.loops import compiled, exponential, rounded, to_float

ROWS_AT_ONCE = 256
"""Of activations a block is multiplied with: they stay in the cache behind the first."""
STEPS_AT_ONCE = 8
"""Of 64 columns: that much of two blocks, and of the rows, stays in the first cache."""
SMALLEST = float32(1e-7)
"""The least absmax, for rows of zeros: vLLM's."""
SWIGLU, SHARE = 0, 1
"""What `_finish` does."""


class Matrices(NamedTuple):
    """One of the two matrices of all experts: [E, N, K].

    weights: int8 [E, N, K + 4], packed; scales: float32 [E, N / 32, 32]. Its adapter's tiles, empty without one:
    down bfloat16 [E, K / 32, R / 16, 16, 16, 2], up [E, N / 16, R / 32, 16, 16, 2] (`int8_experts.py`).
    """

    weights: np.ndarray
    scales: np.ndarray
    down: np.ndarray
    up: np.ndarray


class Tokens(NamedTuple):
    """What experts compute with: rows int64 [T, K / 4] (four bfloat16 each), the same as integers int64 [T, K / 8]
    (eight int8 each) and their scales [T]; by slot (token * k + choice) the choices' weights; the slots in the order of
    their experts, which begin at starts [E + 1]."""

    rows: np.ndarray
    integers: np.ndarray
    scales: np.ndarray
    weights: np.ndarray
    order: np.ndarray
    starts: np.ndarray
    choices: int


@njit(inline="always")
def _nearest(number):
    """The nearest integer, of two as near the even one, below 2^22: what float32 keeps of it beside 1.5 * 2^23."""
    return int8(float32(number + float32(12582912)).view(int32))


@njit(error_model="numpy")
def quantize_rows(rows, integers, scales):
    """Each row of bfloat16 [T, K] to int8 and a float32 scale: absmax / 127, to nearest."""
    for row in range(rows.shape[0]):
        # Without their signs, numbers compare like their bits (and maxima of integers are vectorized).
        bits = uint16(0)
        for column in range(rows.shape[1]):
            bits = max(bits, uint16(rows[row, column] & uint16(0x7FFF)))
        largest = max(to_float(bits), SMALLEST)
        scales[row], factor = largest / float32(127), float32(127) / largest
        for column in range(rows.shape[1]):
            integers[row, column] = _nearest(to_float(rows[row, column]) * factor)


@njit
def group_slots(experts, starts, order, places):
    """Slots by the expert they chose: those of expert e are order[starts[e]:starts[e + 1]], in their own order, and
    places[order[i]] = i. A slot with -1 is in no group, and has -1."""
    starts[:] = 0
    for slot in range(experts.size):
        if experts[slot] >= 0:
            starts[experts[slot] + 1] += 1
    for expert in range(starts.size - 1):
        starts[expert + 1] += starts[expert]
    free = starts.copy()
    for slot in range(experts.size):
        places[slot] = -1
        if experts[slot] >= 0:
            places[slot] = free[experts[slot]]
            order[places[slot]] = slot
            free[experts[slot]] += 1


@compiled()
def sum_shares(places, shares, out):
    """out bfloat16 [T, H] = the sum of each token's shares [.., H], which are at places [T, k], or nowhere (-1)."""
    total = np.empty(out.shape[1], float32)
    for token in range(out.shape[0]):
        total[:] = 0
        for choice in range(places.shape[1]):
            place = places[token, choice]
            if place >= 0:
                for column in range(total.size):
                    total[column] += to_float(shares[place, column])
        for column in range(total.size):
            out[token, column] = uint16(rounded(total[column]))


@njit(inline="always")
def _swiglu(gate, up):
    return gate / (float32(1) + exponential(-gate)) * up


@njit(inline="always")
def _finish(kind, row, number, sums, added, scales, row_numbers, middle, shares):
    """What becomes of a row of the pair of blocks `number`, its sums times the scales of both sides (and what adapters
    add): silu(first) * second, in the middle, or both times the row's weight, in shares [rows, H / 32, 32].

    row_numbers [2, rows]: scales and weights.
    """
    half, scale = number % 2, row_numbers[0, row]
    if kind == SWIGLU:
        other = middle.shape[1] + number
        if added.shape[2]:
            for column in range(32):
                gate = float32(sums[half, 0, row, column]) * scale * scales[number, column]
                up = float32(sums[half, 1, row, column]) * scale * scales[other, column]
                gate, up = gate + added[half, 0, row, column], up + added[half, 1, row, column]
                middle[row, number, column] = _swiglu(gate, up)
        else:
            for column in range(32):
                gate = float32(sums[half, 0, row, column]) * scale * scales[number, column]
                up = float32(sums[half, 1, row, column]) * scale * scales[other, column]
                middle[row, number, column] = _swiglu(gate, up)
    else:
        weight = row_numbers[1, row]
        for block in range(2):
            place = 2 * number + block
            if added.shape[2]:
                for column in range(32):
                    value = float32(sums[half, block, row, column]) * scale * scales[place, column]
                    value += added[half, block, row, column]
                    shares[row, place, column] = uint16(rounded(value * weight))
            else:
                for column in range(32):
                    value = float32(sums[half, block, row, column]) * scale * scales[place, column]
                    shares[row, place, column] = uint16(rounded(value * weight))


@njit(error_model="numpy")
def _multiply(
    kind, tiles, count, steps, first, pairs, apart, after, low, ranks, up,
    rows, sums, added, scales, row_numbers, middle, shares,
):  # fmt: skip
    """Rows of int8, in tiles [count, steps, 16, 64], times a matrix, a pair of blocks after the other; and those of
    bfloat16, in tiles low [count, ranks, 16, 32], times the adapter's up. What `_finish` makes of them is in middle or
    shares then.

    first: where the matrix lies; apart: how many blocks are between those of a pair (pairs, or else 1: neighbours);
    after: where the two blocks lie that come next. Between two instructions that wait for memory, the pair before is
    finished, and the next one fetched: half the time would be spent waiting else.
    """
    size, block_size, tile_size = uintp(128 * sums.shape[2]), uintp(32 * (64 * steps + 4)), uintp(2048 * ranks)
    stride = uintp(2 if apart == 1 else 1)
    # 32 lines of 64 bytes a step and block, and a row a step or more.
    lines, at_once = (31 + count) // count, (rows - 1) // (count * steps) + 1
    for pair in range(pairs):
        left = first + uintp(pair) * stride * block_size
        right = left + uintp(apart) * block_size
        ahead, ahead_of_right = left + stride * block_size, right + stride * block_size
        if pair == pairs - 1:
            ahead, ahead_of_right = after
        half, row = uintp(256 * (pair % 2) * sums.shape[2]), 0
        for begin in range(0, steps, STEPS_AT_ONCE):
            end = min(steps, begin + STEPS_AT_ONCE)
            for tile in range(count):
                place = sums.ctypes.data + half + uintp(tile * 2048)
                if begin == 0:
                    zero(0)
                    zero(1)
                    zero(2)
                    zero(3)
                else:
                    load(0, place, 128)
                    load(1, place + uintp(64), 128)
                    load(2, place + size, 128)
                    load(3, place + size + uintp(64), 128)
                for step in range(begin, end):
                    for line in range(lines):
                        prefetch(ahead + uintp(64 * line))
                        prefetch(ahead_of_right + uintp(64 * line))
                    ahead, ahead_of_right = ahead + uintp(64 * lines), ahead_of_right + uintp(64 * lines)
                    offset = uintp(2048 * step)
                    load(4, tiles + uintp(1024 * (tile * steps + step)), 64)
                    load(5, left + offset, 128)
                    add_product(0, 4, 5)
                    load(6, left + offset + uintp(64), 128)
                    add_product(1, 4, 6)
                    load(7, right + offset, 128)
                    add_product(2, 4, 7)
                    load(5, right + offset + uintp(64), 128)
                    add_product(3, 4, 5)
                    if pair:
                        for _ in range(at_once):
                            if row < rows:
                                _finish(kind, row, pair - 1, sums, added, scales, row_numbers, middle, shares)
                                row += 1
                _store(place, size)
                if ranks and end == steps:
                    tiles_of_left = up + uintp(pair) * stride * tile_size
                    tiles_of_right = tiles_of_left + uintp(apart) * tile_size
                    _add_adapter(low + uintp(1024 * ranks * tile), ranks, tiles_of_left, tiles_of_right)
                    _store(added.ctypes.data + half + uintp(tile * 2048), size)
    for row in range(rows):
        _finish(kind, row, pairs - 1, sums, added, scales, row_numbers, middle, shares)


@njit(inline="always")
def _store(place, size):
    """Tiles 0 to 3 as 16 rows of two blocks."""
    store(0, place, 128)
    store(1, place + uintp(64), 128)
    store(2, place + size, 128)
    store(3, place + size + uintp(64), 128)


@njit(inline="always")
def _add_adapter(low, ranks, first, second):
    """Tiles 0 to 3 = a tile's rows bfloat16 [16, 32 * ranks] times two blocks of an adapter's up."""
    zero(0)
    zero(1)
    zero(2)
    zero(3)
    for rank in range(ranks):
        load(4, low + uintp(1024 * rank), 64)
        load(5, first + uintp(1024 * rank), 64)
        add_product_bfloat16(0, 4, 5)
        load(6, first + uintp(1024 * (ranks + rank)), 64)
        add_product_bfloat16(1, 4, 6)
        load(7, second + uintp(1024 * rank), 64)
        add_product_bfloat16(2, 4, 7)
        load(5, second + uintp(1024 * (ranks + rank)), 64)
        add_product_bfloat16(3, 4, 5)


@njit
def _lower(exact, count, down, low, product):
    """low bfloat16 [count, ranks, 16, 32] = tiles of rows [.., K / 32, 16, 32] times an adapter's down.

    product: room for float32 [16, 32].
    """
    steps, ranks = down.shape[0], low.shape[1]
    place = product.ctypes.data
    for tile in range(count):
        for rank in range(ranks):
            zero(0)
            zero(1)
            for step in range(steps):
                load(4, exact.ctypes.data + uintp(1024 * (tile * steps + step)), 64)
                right = down.ctypes.data + uintp(2048 * (step * ranks + rank))
                load(5, right, 64)
                add_product_bfloat16(0, 4, 5)
                load(6, right + uintp(1024), 64)
                add_product_bfloat16(1, 4, 6)
            store(0, place, 128)
            store(1, place + uintp(64), 128)
            for row in range(16):
                for column in range(32):
                    low[tile, rank, row, column] = uint16(rounded(product[row, column]))


@njit
def _gather(begin, rows, order, choices, scales, weights, integers, exact, row_numbers, tiles, exact_tiles):
    """The tokens of slots: their scales, the choices' weights, and tiles of their int8 and, for adapters, bfloat16."""
    for row in range(rows):
        slot = order[begin + row]
        token = slot // choices
        row_numbers[0, row], row_numbers[1, row] = scales[token], weights[slot]
        for step in range(tiles.shape[1]):
            for column in range(8):
                tiles[row // 16, step, row % 16, column] = integers[token, 8 * step + column]
        for step in range(exact_tiles.shape[1]):
            for column in range(8):
                exact_tiles[row // 16, step, row % 16, column] = exact[token, 8 * step + column]


@njit(error_model="numpy")
def _quantize_middle(rows, numbers, line, row_numbers, tiles, exact_tiles):
    """float32 [rows, I] as tiles of int8 and, for adapters, bfloat16; line: int8 [I]."""
    for row in range(rows):
        bits = uint32(0)
        for column in range(line.size):
            bits = max(bits, uint32(float32(numbers[row, column]).view(uint32) & uint32(0x7FFFFFFF)))
        largest = max(uint32(bits).view(float32), SMALLEST)
        row_numbers[0, row], factor = largest / float32(127), float32(127) / largest
        for column in range(line.size):
            line[column] = _nearest(numbers[row, column] * factor)
        for step in range(tiles.shape[1]):
            for column in range(64):
                tiles[row // 16, step, row % 16, column] = line[64 * step + column]
        for step in range(exact_tiles.shape[1]):
            for column in range(32):
                exact_tiles[row // 16, step, row % 16, column] = uint16(rounded(numbers[row, 32 * step + column]))


@njit
def _most_rows(experts, starts):
    most = 0
    for turn in range(experts.size):
        most = max(most, starts[experts[turn] + 1] - starts[experts[turn]])
    return min(most, ROWS_AT_ONCE)


@compiled(error_model="numpy")
def experts_of_slots(configuration, experts, tokens, gate_up, down, shares):
    """shares bfloat16 [slots, H / 32, 32], in the slots' order, = weight * W_down (silu(W_gate x) * (W_up x)) for the
    slots of these experts, activations rounded to int8 before each product; adapters act on them in bfloat16.

    configuration: that of full tiles; gate_up, down: Matrices [E, 2I, H] and [E, H, I].
    """
    hidden, width, ranks = gate_up.weights.shape[2] - 4, down.weights.shape[2] - 4, gate_up.up.shape[2]
    adapted, count = min(ranks, 1), (_most_rows(experts, tokens.starts) + 15) // 16
    # Rows of a tile that is not full are computed with, and left.
    tiles, middle_tiles = np.empty((count, hidden // 64, 16, 8), int64), np.empty((count, width // 64, 16, 64), int8)
    exact_tiles = np.empty((count, adapted * hidden // 32, 16, 8), int64)
    exact_middle_tiles = np.empty((count, adapted * width // 32, 16, 32), uint16)
    low, product, line = np.empty((count, ranks, 16, 32), uint16), np.empty((16, 32), float32), np.empty(width, int8)
    sums, added = np.empty((2, 2, 16 * count, 32), int32), np.empty((2, 2, adapted * 16 * count, 32), float32)
    middle, row_numbers = np.empty((16 * count, width // 32, 32), float32), np.empty((2, 16 * count), float32)
    numbers = middle.reshape((16 * count, width))
    block_size, pairs = uintp(32 * (width + 4)), width // 32
    half = uintp(pairs * 32 * (hidden + 4))
    configure(configuration.ctypes.data)
    for turn in range(experts.size):
        expert = experts[turn]
        first, second = gate_up.weights[expert].ctypes.data, down.weights[expert].ctypes.data
        following = gate_up.weights[experts[min(turn + 1, experts.size - 1)]].ctypes.data
        begin, end = tokens.starts[expert], tokens.starts[expert + 1]
        while begin < end:
            rows = min(ROWS_AT_ONCE, end - begin)
            count, target, up = (rows + 15) // 16, shares[begin : begin + rows], uintp(0)
            _gather(
                begin, rows, tokens.order, tokens.choices, tokens.scales, tokens.weights, tokens.integers, tokens.rows,
                row_numbers, tiles, exact_tiles,
            )  # fmt: skip
            if ranks:
                _lower(exact_tiles, count, gate_up.down[expert], low, product)
                up = gate_up.up[expert].ctypes.data
            _multiply(
                SWIGLU, tiles.ctypes.data, count, hidden // 64, first, pairs, pairs, (second, second + block_size),
                low.ctypes.data, ranks, up, rows, sums, added, gate_up.scales[expert], row_numbers, middle, target,
            )  # fmt: skip
            _quantize_middle(rows, numbers, line, row_numbers, middle_tiles, exact_middle_tiles)
            if ranks:
                _lower(exact_middle_tiles, count, down.down[expert], low, product)
                up = down.up[expert].ctypes.data
            _multiply(
                SHARE, middle_tiles.ctypes.data, count, width // 64, second, hidden // 64, 1,
                (following, following + half), low.ctypes.data, ranks, up, rows, sums, added, down.scales[expert],
                row_numbers, middle, target,
            )  # fmt: skip
            begin += rows
    release()


@compiled()
def group_tokens(rows, ids, weights, experts):
    """Tokens of rows bfloat16 [T, K] for ids int32 and weights float32 [T, k]; where each slot is in their order
    [T, k]; and the experts that have some."""
    integers, scales = np.empty(rows.shape, int8), np.empty(rows.shape[0], float32)
    quantize_rows(rows, integers, scales)
    starts, order, places = np.empty(experts + 1, int32), np.empty(ids.size, int32), np.empty(ids.shape, int32)
    group_slots(ids.reshape(-1), starts, order, places.reshape(-1))
    chosen = np.flatnonzero(starts[1:] - starts[:-1])
    eights, fours = integers.view(int64), rows.view(int64)
    return Tokens(fours, eights, scales, weights.reshape(-1), order, starts, ids.shape[1]), places, chosen


@compiled()
def experts_of_tokens(configuration, rows, ids, weights, gate_up, down, shares, out):
    """out bfloat16 [T, H] = the weighted sum over each token's experts, on one thread in one call: what Python does
    between several takes as long as an expert."""
    tokens, places, chosen = group_tokens(rows, ids, weights, gate_up.weights.shape[0])
    experts_of_slots(configuration, chosen, tokens, gate_up, down, shares)
    sum_shares(places, shares.reshape((shares.shape[0], out.shape[1])), out)
