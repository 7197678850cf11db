"""Rounding that keeps small changes: the numbers it draws, and the grids it rounds to.

A quantized weight W lies on its grid. Rounding W + D to the nearest point gives W back wherever |D| is below half a
step; rounding up with the probability of the distance from the point below gives W + D on average, however small D is.
The numbers are counter-based: that of an element follows from (seed, step, name, its index in the full weight), so
every shard of every layout rounds alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

CHUNK_ELEMENTS = 1 << 17
"""What is worked on at once: half a MiB of float32 and its temporaries stay in a core's cache."""


@dataclass(frozen=True)
class Rounding:
    """How the changes of one step are rounded. Not stochastic: to the nearest point, the even one of two."""

    stochastic: bool
    seed: int = 0
    step: int = 0

    def rows(
        self, name: str, first_row: int, rows: int, columns: int, first_column: int = 0, width: int | None = None
    ) -> torch.Tensor | None:
        """Thresholds in (0, 1) of a part of the full weight `name` [N, width]: float32 [rows, columns]; None: nearest.

        A share p of them is below p, up to 2**-24. width: None means that the part has whole rows.
        """
        if not self.stochastic:
            return None
        width = columns if width is None else width
        # Counters of 2**32 elements and more begin anew, as their lower 32 bits do.
        starts = (torch.arange(first_row, first_row + rows) * width + first_column).to(torch.int32)
        bits = _hash(_key(self.seed, self.step, name), starts[:, None] + torch.arange(columns, dtype=torch.int32))
        # 23 bits and a half: each is exact in float32, and neither 0 nor 1 is among them.
        return bits.bitwise_and_(0x7FFFFF).to(torch.float32).add_(0.5).mul_(2.0**-23)


def _key(seed: int, step: int, name: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}:{step}:{name}".encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4))
    return first, second


def _hash(key: tuple[int, int], numbers: torch.Tensor) -> torch.Tensor:
    """32 bits for each of these counters, int32 of any shape, which are overwritten.

    Xor-shifts and multiplications by the constants of Wellons' lowbias32 (found by a search for what mixes best), with
    one half of the key before and one in the middle; int32 arithmetic wraps as that of unsigned numbers does.
    """
    spare = torch.empty_like(numbers)
    for half in key:
        numbers.add_(half)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
            _xor_shift(numbers, spare, shift)
            numbers.mul_(factor)
    _xor_shift(numbers, spare, 16)
    return numbers


def _xor_shift(numbers: torch.Tensor, spare: torch.Tensor, shift: int) -> None:
    """numbers ^= numbers >> shift, without the sign that torch's shift draws in."""
    torch.bitwise_right_shift(numbers, shift, out=spare)
    spare.bitwise_and_((1 << (32 - shift)) - 1)
    numbers.bitwise_xor_(spare)


def round_change(change: torch.Tensor, thresholds: torch.Tensor | None) -> torch.Tensor:
    """A change of grid points, in steps, to whole steps; both float32, the result too.

    The points themselves never enter, so that a change of 1e-6 steps has its probability of 1e-6 beside 127 steps.
    """
    if thresholds is None:
        return change.round()
    whole = change.floor()
    return whole.add_(thresholds < change - whole)


def round_to_grid(
    points: torch.Tensor, change: torch.Tensor, grid: torch.Tensor, thresholds: torch.Tensor | None
) -> torch.Tensor:
    """points + change, rounded to one of its two neighbours on the grid (beyond its ends: to the end).

    Args: points: numbers of the grid; change, thresholds: of their shape; grid: ascending. All float32.
    """
    if is_even(grid):
        moved = round_change(change / (grid[1] - grid[0]), thresholds).mul_(grid[1] - grid[0]).add_(points)
        return moved.clamp_(float(grid[0]), float(grid[-1]))
    above = torch.searchsorted(grid, points + change, right=True).clamp_(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    # The distance from the point first, which is exact.
    share = (points - low).add_(change).div_(high - low)
    return torch.where(share > (0.5 if thresholds is None else thresholds), high, low)


def is_even(grid: torch.Tensor) -> bool:
    """Whether all neighbours on the grid are as far apart."""
    gaps = grid.diff()
    return bool((gaps == gaps[0]).all())


def round_to_bfloat16(exact: torch.Tensor, thresholds: torch.Tensor | None) -> torch.Tensor:
    """float32 to one of its two neighbours in bfloat16, which are right on average; nearest without thresholds."""
    if thresholds is None:
        return exact.to(torch.bfloat16)
    # The lower 16 bits are the distance from the neighbour towards 0, in 65,536ths of the gap.
    lifted = exact.view(torch.int32) + (thresholds * 65536.0).to(torch.int32)
    return lifted.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)
