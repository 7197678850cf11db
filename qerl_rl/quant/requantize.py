"""A weight of a format plus a change of low rank, rounded to the format again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_rl.quant.formats import Parts
from qerl_rl.quant.rounding import CHUNK_ELEMENTS, Rounding, changed_integers, round_to_bfloat16


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


def merged_parts(
    parts: Parts, a: torch.Tensor, b: torch.Tensor, *, rounding: Rounding, name: str, survival: Survival
) -> dict[str, torch.Tensor]:
    """The parts of W + B A, for a full weight W [N, K] in the parts of its format; B A = 0 gives W's own numbers.

    Args: parts: tensor by suffix. a [rank, K], b [N, rank] float32. name: of the weight, which the rounding draws for.
    survival: what came through is added to it.
    """
    changed = {suffix: part.clone() for suffix, part in parts.items()}
    rows, columns = b.shape[0], a.shape[1]
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        change = b[some] @ a
        thresholds = rounding.rows(name, first, some.stop - first, columns)
        survival.count(_merge_rows(parts, changed, some, change, thresholds), change)
    return changed


def _merge_rows(
    parts: Parts, changed: dict[str, torch.Tensor], rows: slice, change: torch.Tensor, thresholds: torch.Tensor | None
) -> torch.Tensor:
    """Write the merged rows into `changed`; returns how far they moved, float32 as `change`."""
    base = parts[""][rows]
    if not base.is_floating_point():
        codes, scale = base.to(torch.float32), parts["_scale"][rows]
        merged, longer = changed_integers(codes, scale, change, thresholds, 8)
        changed[""][rows], changed["_scale"][rows] = merged.to(torch.int8), longer
        return merged.mul_(longer.to(torch.float32)).sub_(codes.mul_(scale.to(torch.float32)))
    exact = base.to(torch.float32)
    changed[""][rows] = round_to_bfloat16(exact + change, thresholds).to(base.dtype)
    return changed[""][rows].to(torch.float32) - exact
