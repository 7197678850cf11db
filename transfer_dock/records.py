"""What the ledger remembers about blocks, samples, groups and leases."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from transfer_dock.keys import SampleKey, group_of


@dataclass
class Block:
    """The flat array of one put and column, wherever it lies; `live` unfinished samples still need it."""

    ref: Any
    nbytes: int
    live: int = 0


@dataclass
class Sample:
    """One sample. `missing` counts, by consumer, the columns that are not there; holders and finishers are leases."""

    missing: dict[str, int]
    digests: dict[str, bytes] = field(default_factory=dict)
    places: dict[str, tuple[Block, int, int]] = field(default_factory=dict)
    leased: dict[str, int] = field(default_factory=dict)
    acked: dict[str, int] = field(default_factory=dict)


@dataclass
class Group:
    """Every index that was ever put in this group, and how many held samples have each column."""

    indices: set[int] = field(default_factory=set)
    columns: dict[str, int] = field(default_factory=dict)


@dataclass
class LeaseRecord:
    """What a consumer holds. A unit (a sample, or a group when whole groups were asked for) ends as one piece."""

    consumer: str
    deadline: float
    whole_groups: bool
    units: dict[Hashable, list[SampleKey]]
    pending: dict[Hashable, set[SampleKey]]

    def unit_of(self, key: SampleKey) -> Hashable:
        return group_of(key) if self.whole_groups else key

    def holds(self, key: SampleKey) -> bool:
        return key in self.units.get(self.unit_of(key), ())
