"""A weight of a format plus a change of low rank, rounded to the format again.

Scales stay the base's, so that the base lies on the grid and the change alone is rounded. A group that the change
carries beyond the end of the grid gets the next larger scale that holds it: in steps of that scale the base is where
it was but for a little, which joins the change. The mean over the random numbers is then W + D everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qerl_rl.quant.base import Format, Parts
from qerl_rl.quant.rounding import CHUNK_ELEMENTS, Rounding, round_to_bfloat16, round_to_grid


@dataclass
class Survival:
    """How much of the changes D of weights W came through Q: sums of (Q(W + D) - Q(W)) * D and of D * D."""

    applied: float = 0.0
    wanted: float = 0.0

    def add(self, other: Survival, share: float = 1.0) -> None:
        """Add the sums of other weights, counted `share` times."""
        self.applied += share * other.applied
        self.wanted += share * other.wanted

    def count(self, applied: torch.Tensor, wanted: torch.Tensor) -> None:
        """Add elements: two float32 tensors of one shape."""
        self.applied += float(torch.dot(applied.flatten(), wanted.flatten()))
        self.wanted += float(torch.dot(wanted.flatten(), wanted.flatten()))

    @property
    def ratio(self) -> float:
        """1 when all of it came through (on average, as it does with stochastic rounding), also of no change at all."""
        return self.applied / self.wanted if self.wanted else 1.0


@dataclass(frozen=True)
class Shard:
    """Which part of the full weight `name` [N, width] is merged: it draws the numbers that the whole would draw there.

    width: 0 means that the part has whole rows.
    """

    name: str
    first_row: int = 0
    first_column: int = 0
    width: int = 0

    def thresholds(self, rounding: Rounding, row: int, rows: int, columns: int) -> torch.Tensor | None:
        """Of `rows` rows from `row` of the part on: float32 [rows, columns], all its columns."""
        width = self.width or columns
        return rounding.rows(self.name, self.first_row + row, rows, columns, self.first_column, width)


def merged_parts(
    format: Format,
    parts: Parts,
    a: torch.Tensor,
    b: torch.Tensor,
    rounding: Rounding,
    shard: Shard,
    survival: Survival,
    growth: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The parts, as in memory, of W + B A for a part W [N, K] of a weight in `format`; B A = 0 gives W's own numbers.

    Args: a [rank, K], b [N, rank] float32. survival: what came through is added to it. growth: what `scale_growth`
    gave, where the scales stand for weights of other ranks too; by default that of this part alone.
    """
    chunks = []
    for rows, change in _chunks(a, b):
        thresholds = shard.thresholds(rounding, rows.start, *change.shape)
        some = {key: part[rows] for key, part in parts.items()}
        chunk, applied = requantized(format, some, change, thresholds, None if growth is None else growth[rows])
        survival.count(applied, change)
        chunks.append(chunk)
    return {part.suffix: joined_rows([chunk[part.suffix] for chunk in chunks]) for part in format.parts}


def scale_growth(format: Format, parts: Parts, a: torch.Tensor, b: torch.Tensor, stochastic: bool) -> torch.Tensor:
    """How many times as large the scales of W + B A must be to hold it: float32 [N, groups], below 1 where they do.

    The maximum over the shards of a row is that of the row. Args: as of `merged_parts`.
    """
    chunks = [
        _moved(format, {key: part[rows] for key, part in parts.items()}, change, stochastic)[3]
        for rows, change in _chunks(a, b)
    ]
    return torch.cat(chunks)


def merged_bfloat16(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, rounding: Rounding, shard: Shard, survival: Survival
) -> torch.Tensor:
    """As `merged_parts`, for a weight bfloat16 [N, K] that is computed with as it is; of the same type."""
    merged = torch.empty(weight.shape, dtype=torch.bfloat16)
    for rows, change in _chunks(a, b):
        thresholds = shard.thresholds(rounding, rows.start, *change.shape)
        exact = weight[rows].to(torch.float32)
        merged[rows] = round_to_bfloat16(exact + change, thresholds)
        survival.count(merged[rows].to(torch.float32) - exact, change)
    return merged


def requantized(
    format: Format,
    parts: Parts,
    change: torch.Tensor,
    thresholds: torch.Tensor | None,
    growth: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Rows of a weight in `format` with a change added.

    Args: parts: of rows [n, K], by suffix. change, thresholds (None: nearest) float32 [n, K]. growth: as of
    `merged_parts`.
    Returns: parts of the changed rows, and how far the weights moved, float32 [n, K].
    """
    points, steps, moves, needed = _moved(format, parts, change, thresholds is not None)
    first, units = format.parts[0].suffix, _units(format, parts)
    grown = _grown(parts["_scale"], needed if growth is None else growth)
    scales = {suffix: parts[suffix] for suffix in units} | {"_scale": grown}
    longer = format.steps(scales)[..., None]
    # How much longer the steps are: 0 but where they had to grow.
    excess = (longer - steps) / steps
    moves.sub_(points * excess).div_(1.0 + excess)
    if thresholds is not None:
        thresholds = thresholds.view_as(moves)
    merged = round_to_grid(points, moves, format.grid, thresholds)
    encoded = format.encode(merged.flatten(-2), units)[first]
    return {first: encoded, **scales}, (merged * longer).sub_(points * steps).flatten(-2)


def _moved(
    format: Format, parts: Parts, change: torch.Tensor, stochastic: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows of a weight: points of the grid [n, groups, K / groups], their steps [n, groups, 1], the change in steps,
    and how many times as large the scales [n, groups] must be to hold it."""
    first, grid = format.parts[0].suffix, format.grid
    steps = format.steps(parts)[..., None]
    points = format.dequantize({first: parts[first], **_units(format, parts)}).unflatten(-1, (steps.shape[-2], -1))
    moves = change.unflatten(-1, (steps.shape[-2], -1)) / steps
    reach = points + moves
    if not stochastic:
        # What is nearest to an end of the grid goes there: longer steps would move all others by more.
        low, high = 1.5 * grid[0] - 0.5 * grid[1], 1.5 * grid[-1] - 0.5 * grid[-2]
        near = (reach >= low) & (reach <= high)
        reach = torch.where(near, reach.clamp(float(grid[0]), float(grid[-1])), reach)
    needed = torch.maximum(reach.amax(-1) / float(grid[-1]), reach.amin(-1) / float(grid[0]))
    return points, steps, moves, needed


def _units(format: Format, parts: Parts) -> dict[str, torch.Tensor]:
    """Scales of 1 in the shape of these."""
    return {part.suffix: _ones(part.dtype).expand_as(parts[part.suffix]) for part in format.parts[1:]}


def _grown(scale: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    """Scales at least `needed` times (where that is more than 1) as large, the smallest that the dtype has.

    Where there is none as large, the largest: what lies beyond the grid is cut off then.
    """
    more = needed > 1.0
    if scale.dtype == torch.uint8:
        # Exponents of two (e8m0); 255 is no number.
        return torch.where(more, (scale + needed.log2().ceil()).clamp_max(254.0), scale.float()).to(torch.uint8)
    exact = scale.to(torch.float32) * needed
    if scale.dtype == torch.float8_e4m3fn:
        # 448 is the largest; one more bit makes the next number of any positive float.
        near = exact.clamp_max(448.0).to(scale.dtype)
        up = (near.view(torch.uint8) + 1).clamp_max(0x7E).view(scale.dtype)
        above = torch.where(near.float() < exact, up.float(), near.float())
    else:
        near = exact.to(scale.dtype)
        up = torch.nextafter(near, torch.full_like(near, torch.inf))
        above = torch.where(near.float() < exact, up.float(), near.float())
    return torch.where(more, above, scale.to(torch.float32)).to(scale.dtype)


def _ones(dtype: torch.dtype) -> torch.Tensor:
    """The scale 1 as a part of this dtype holds it: in bytes as the exponent of two plus 127."""
    return torch.tensor([127], dtype=dtype) if dtype == torch.uint8 else torch.ones(1, dtype=torch.float32).to(dtype)


def _chunks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of B A, a cacheful at a time."""
    rows, step = b.shape[0], max(1, CHUNK_ELEMENTS // a.shape[1])
    slices = [slice(first, min(first + step, rows)) for first in range(0, rows, step)]
    for some in slices:
        if some.stop - some.start > 1:
            yield some, b[some] @ a
        else:
            # A single row would be a product of another kernel, whose sums end in other bits than those of a shard.
            yield some, (b[some].expand(2, -1) @ a)[:1]


def joined_rows(chunks: list[torch.Tensor]) -> torch.Tensor:
    """Along the rows; torch joins no 8-bit floats."""
    if chunks[0].dtype == torch.float8_e4m3fn:
        return torch.cat([chunk.view(torch.uint8) for chunk in chunks]).view(torch.float8_e4m3fn)
    return torch.cat(chunks)
