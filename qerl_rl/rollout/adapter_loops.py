"""What acts between the int8 products of experts: their adapters, in float32, SwiGLU, and the weighted sum.

Slots (token * k + choice) come in the order of their experts: those of expert e are starts[e] to starts[e + 1]. What a
row gets does not depend on the rows beside it: four are always computed together, be they nobody's.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy import float32, int32, uint16

from qerl_rl.platform.loops import compiled, exponential, rounded, to_float
from qerl_rl.rollout.int8_loops import group_slots

TOGETHER = 4
"""Rows, and numbers of an adapter's rank, that are computed with at once."""


@compiled()
def group(ids, experts):
    """Of ids int32 [T, k], -1 for none: starts int32 [experts + 1], the slots in the order of their experts, the place
    of each in it [T, k], and the experts that have some."""
    starts, order, places = np.empty(experts + 1, int32), np.empty(ids.size, int32), np.empty(ids.shape, int32)
    group_slots(ids.reshape(-1), starts, order, places.reshape(-1))
    return starts, order[: starts[experts]], places, np.flatnonzero(starts[1:] - starts[:-1])


# Only the order of a sum is LLVM's choice, always the same one for rows of a length.
@njit(fastmath={"reassoc", "contract"})
def _lower(numbers, down, low, begin, count):
    """low [slots, R] from `begin` on = numbers [4, K] @ down [R, K], transposed; the first `count` rows of them."""
    for rank in range(down.shape[0]):
        first, second, third, fourth = float32(0), float32(0), float32(0), float32(0)
        for column in range(down.shape[1]):
            number = down[rank, column]
            first += numbers[0, column] * number
            second += numbers[1, column] * number
            third += numbers[2, column] * number
            fourth += numbers[3, column] * number
        sums = (first, second, third, fourth)
        for row in range(count):
            low[begin + row, rank] = sums[row]


@njit(fastmath={"contract"})
def _raise(low, up, first, second):
    """first, second [N] += low [2, R] @ up [R, N]; R is a multiple of 4."""
    for rank in range(0, up.shape[0], 4):
        a, b, c, d = low[0, rank], low[0, rank + 1], low[0, rank + 2], low[0, rank + 3]
        e, f, g, h = low[1, rank], low[1, rank + 1], low[1, rank + 2], low[1, rank + 3]
        for column in range(first.size):
            one, two, three, four = up[rank, column], up[rank + 1, column], up[rank + 2, column], up[rank + 3, column]
            first[column] += a * one + b * two + c * three + d * four
            second[column] += e * one + f * two + g * three + h * four


@njit
def _add_adapter(products, low, up, begin, count, totals):
    """totals [4, N] = products bfloat16 [slots, N] from `begin` on plus low [slots, R] @ up [R, N], `count` rows."""
    lows = np.zeros((TOGETHER, low.shape[1]), float32)
    for row in range(count):
        lows[row] = low[begin + row]
        for column in range(totals.shape[1]):
            totals[row, column] = to_float(products[begin + row, column])
    _raise(lows[:2], up, totals[0], totals[1])
    if count > 2:
        _raise(lows[2:], up, totals[2], totals[3])


@njit(error_model="numpy")
def _swiglu(gate_up, out):
    """out [I] = silu of the first half of gate_up [2I], times the second."""
    for column in range(out.size):
        gate = gate_up[column]
        out[column] = gate / (float32(1) + exponential(-gate)) * gate_up[out.size + column]


@njit
def _round(numbers, out):
    for column in range(out.size):
        out[column] = uint16(rounded(numbers[column]))


@compiled()
def gather(experts, starts, order, choices, rows, down, gathered, low):
    """gathered [slots, K] = rows bfloat16 [T, K] of the slots of these experts; low float32 [slots, R] = them @ down
    [E, R, K], transposed."""
    numbers = np.zeros((TOGETHER, rows.shape[1]), float32)
    for expert in experts:
        end = starts[expert + 1]
        for begin in range(starts[expert], end, TOGETHER):
            count = min(TOGETHER, end - begin)
            for row in range(count):
                token = order[begin + row] // choices
                for column in range(numbers.shape[1]):
                    gathered[begin + row, column] = rows[token, column]
                    numbers[row, column] = to_float(rows[token, column])
            _lower(numbers, down[expert], low, begin, count)


@compiled()
def activate(experts, starts, gate_up, low, up, activated, down, low_of_down):
    """activated bfloat16 [slots, I] = silu(gate) * up of gate_up bfloat16 [slots, 2I] plus low [slots, R] @ up
    [E, R, 2I], for these experts; low_of_down [slots, R] = it, unrounded, @ down [E, R, I], transposed."""
    totals = np.zeros((TOGETHER, gate_up.shape[1]), float32)
    numbers = np.zeros((TOGETHER, activated.shape[1]), float32)
    for expert in experts:
        end = starts[expert + 1]
        for begin in range(starts[expert], end, TOGETHER):
            count = min(TOGETHER, end - begin)
            _add_adapter(gate_up, low, up[expert], begin, count, totals)
            for row in range(count):
                _swiglu(totals[row], numbers[row])
                _round(numbers[row], activated[begin + row])
            _lower(numbers, down[expert], low_of_down, begin, count)


@compiled()
def share(experts, starts, order, products, low, up, weights, shares):
    """shares bfloat16 [slots, H] = weights float32 [T * k] * (products bfloat16 [slots, H] + low [slots, R] @ up
    [E, R, H]), for these experts."""
    totals = np.zeros((TOGETHER, products.shape[1]), float32)
    for expert in experts:
        end = starts[expert + 1]
        for begin in range(starts[expert], end, TOGETHER):
            count = min(TOGETHER, end - begin)
            _add_adapter(products, low, up[expert], begin, count, totals)
            for row in range(count):
                totals[row] *= weights[order[begin + row]]
                _round(totals[row], shares[begin + row])
