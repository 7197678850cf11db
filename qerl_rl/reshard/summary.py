"""What a resharding plan costs: bytes of each rank and each class of link, against the fewest there could be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PlanSummary:
    """Bytes of a plan, by rank where they are arrays [ranks] int64.

    copied: within a card. same_node, across_nodes: what is sent, by the link it takes. lower_bound: what each rank
    needs and does not hold. experts_moved, experts_lower_bound: of routed experts alone. fewest_buckets: that many are
    filled by the sends and receives of the busiest rank.
    """

    sent: np.ndarray
    received: np.ndarray
    copied: np.ndarray
    same_node: int
    across_nodes: int
    lower_bound: int
    experts_moved: int
    experts_lower_bound: int
    buckets: int
    fewest_buckets: int
    transfers: int

    @property
    def moved(self) -> int:
        """Bytes that go from a rank to another."""
        return int(self.sent.sum())

    @property
    def moved_over_lower_bound(self) -> float:
        return _ratio(self.moved, self.lower_bound)

    @property
    def experts_moved_over_lower_bound(self) -> float:
        return _ratio(self.experts_moved, self.experts_lower_bound)

    def __str__(self) -> str:
        rows = [f"{'bytes of a rank':<22}{'least':>12}{'mean':>12}{'most':>12}{'all ranks':>14}"]
        for name, values in (("sent", self.sent), ("received", self.received), ("copied", self.copied)):
            numbers = (values.min(), values.mean(), values.max())
            rows.append(f"{name:<22}" + "".join(f"{_size(n):>12}" for n in numbers) + f"{_size(values.sum()):>14}")
        rows += [
            f"links: same card {_size(self.copied.sum())}, same node {_size(self.same_node)}, "
            f"across nodes {_size(self.across_nodes)}",
            f"moved {_size(self.moved)} in {self.transfers} boxes: {self.moved_over_lower_bound:.3f} of the lower "
            f"bound {_size(self.lower_bound)} (experts {self.experts_moved_over_lower_bound:.3f})",
            f"buckets: {self.buckets}, of which the busiest rank's bytes fill {self.fewest_buckets}",
        ]
        return "\n".join(rows)


def _ratio(moved: int, lower_bound: int) -> float:
    """1 where nothing needs to move and nothing does."""
    return moved / lower_bound if lower_bound else 1.0 + moved


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
