"""The samples that one consumer could take now, in the order of their keys."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

from transfer_dock.keys import GroupKey, SampleKey

# Above this share of new entries sorting a list anew is cheaper than inserting them one by one.
FEW = 1 / 32


class Pool:
    """Available samples of one consumer by group, and which groups are complete (`samples_per_group` samples)."""

    def __init__(self, samples_per_group: int) -> None:
        self.samples_per_group = samples_per_group
        self.size = 0
        self.members: dict[GroupKey, list[SampleKey]] = {}
        self.groups: list[GroupKey] = []
        self.complete: list[GroupKey] = []

    def available(self) -> list[SampleKey]:
        return [key for group in self.groups for key in self.members[group]]

    def add(self, keys: Sequence[SampleKey]) -> None:
        members, whole = self.members, self.samples_per_group
        entered, completed = [], []
        for key in keys:
            group: GroupKey = key[:2]
            found = members.get(group)
            if found is None:
                found = members[group] = [key]
                entered.append(group)
            elif found[-1] < key:
                found.append(key)
            else:
                insort(found, key)
            if len(found) == whole:
                completed.append(group)
        self.size += len(keys)
        _insert(self.groups, entered)
        _insert(self.complete, completed)

    def remove(self, keys: Sequence[SampleKey]) -> None:
        members, whole = self.members, self.samples_per_group
        emptied, broken = [], []
        for key in keys:
            group: GroupKey = key[:2]
            found = members[group]
            if len(found) == whole:
                broken.append(group)
            if len(found) == 1:
                del members[group]
                emptied.append(group)
            else:
                del found[bisect_left(found, key)]
        self.size -= len(keys)
        _delete(self.groups, emptied)
        _delete(self.complete, broken)

    def of_step(self, step: int | None, whole_groups: bool) -> list[GroupKey]:
        """The groups, of one step or of all, with samples (or all their samples) here."""
        ordered = self.complete if whole_groups else self.groups
        if step is None:
            return ordered
        return ordered[bisect_left(ordered, (step,)) : bisect_left(ordered, (step + 1,))]  # type: ignore[type-var]

    def choose(
        self,
        count: int,
        minimum: int,
        whole_groups: bool,
        step: int | None,
        may_go: Callable[[GroupKey], bool] | None = None,
    ) -> list[SampleKey] | None:
        """The lowest `count` samples (at least `minimum`) of groups that may go; None when there are too few."""
        if self.size < minimum:
            return None
        chosen: list[SampleKey] = []
        for group in self.of_step(step, whole_groups):
            if may_go is None or may_go(group):
                chosen += self.members[group]
                if len(chosen) >= count:
                    break
        return chosen[:count] if len(chosen) >= minimum else None


def _insert(ordered: list[Any], added: list[Any]) -> None:
    if not added:
        return
    added.sort()
    if not ordered or ordered[-1] < added[0]:
        ordered += added
    elif len(added) < FEW * len(ordered):
        for entry in added:
            insort(ordered, entry)
    else:
        ordered += added
        ordered.sort()


def _delete(ordered: list[Any], removed: list[Any]) -> None:
    if not removed:
        return
    removed.sort()
    first = bisect_left(ordered, removed[0])
    if ordered[first : first + len(removed)] == removed:
        del ordered[first : first + len(removed)]
    elif len(removed) < FEW * len(ordered):
        for entry in removed:
            del ordered[bisect_left(ordered, entry)]
    else:
        gone = set(removed)
        ordered[:] = [entry for entry in ordered if entry not in gone]
