"""The samples that one consumer could take now, in the order of their keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

from transfer_dock.keys import GroupKey, SampleKey, group_of


class Pool:
    """Available samples of one consumer, and which groups are available completely (`samples_per_group` samples)."""

    def __init__(self, samples_per_group: int) -> None:
        self.samples_per_group = samples_per_group
        self.keys: list[SampleKey] = []
        self.groups: list[GroupKey] = []
        self._members: dict[GroupKey, int] = {}

    def add(self, key: SampleKey) -> None:
        insort(self.keys, key)
        group = group_of(key)
        self._members[group] = self._members.get(group, 0) + 1
        if self._members[group] == self.samples_per_group:
            insort(self.groups, group)

    def remove(self, key: SampleKey) -> None:
        del self.keys[bisect_left(self.keys, key)]
        group = group_of(key)
        if self._members[group] == self.samples_per_group:
            del self.groups[bisect_left(self.groups, group)]
        self._members[group] -= 1
        if not self._members[group]:
            del self._members[group]

    def choose(self, count: int, minimum: int, whole_groups: bool, step: int | None) -> list[SampleKey] | None:
        """The lowest `count` samples (at least `minimum`), of one step or of all; None when there are too few."""
        if not whole_groups:
            low, high = _of_step(self.keys, step)
            return self.keys[low : min(high, low + count)] if high - low >= minimum else None
        size = self.samples_per_group
        low, high = _of_step(self.groups, step)
        if (high - low) * size < minimum:
            return None
        chosen: list[SampleKey] = []
        for group in self.groups[low : min(high, low + count // size)]:
            # A tuple sorts before every longer one that it begins, so this is where the group's samples start.
            first = bisect_left(self.keys, group)  # type: ignore[type-var]
            chosen += self.keys[first : first + size]
        return chosen


def _of_step(ordered: list[Any], step: int | None) -> tuple[int, int]:
    if step is None:
        return 0, len(ordered)
    return bisect_left(ordered, (step,)), bisect_left(ordered, (step + 1,))
