"""Samples under a lease: small to send around, its payload is read where and when it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transfer_dock.access import Access
from transfer_dock.arena import Pin
from transfer_dock.calls import ask
from transfer_dock.columns import ColumnRead, as_values
from transfer_dock.errors import InvalidRequest, LeaseLost, UnknownColumn, unknown_name
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey, describe_keys, pack_keys


class Lease(NamedTuple):
    """The right to work on samples: the number of the grant (it fences late acknowledgements) and its consumer."""

    number: int
    consumer: str


class LazyColumns(Mapping[str, Any]):
    """Column name -> values, read at the first look. Iterating names reads nothing.

    The process that took the lease holds on to the bytes of its own node at once (`pins`); another one takes hold when
    it first looks, and then asks the dock whether the lease still stands: before that the memory could be others'.
    """

    def __init__(
        self,
        reads: Mapping[str, ColumnRead],
        access: Access,
        lease: Lease,
        keys: Sequence[SampleKey],
        timeout: float,
        pins: dict[int, Pin] | None,
    ) -> None:
        self.reads, self.timeout = dict(reads), timeout
        self._access, self._lease, self._keys, self._pins = access, lease, tuple(keys), pins
        self._values: dict[str, Jagged | np.ndarray | list[Any]] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            if name not in self.reads:
                raise UnknownColumn(unknown_name("column for this consumer", name, self.reads))
            read = self.reads[name]
            pins = self._pinned()
            flat = self._access.rows(read, pins, self.timeout)
            if not self._access.is_local(read):
                self._check_lease()
            self._values[name] = as_values(read, flat)
        return self._values[name]

    # Mapping asks for the value and expects a KeyError: these would fail for a missing name, and read one.
    def __contains__(self, name: object) -> bool:
        return name in self.reads

    def get(self, name: str, default: Any = None) -> Any:
        """The values of a column, or `default` where this consumer reads none of that name."""
        return self[name] if name in self.reads else default

    def _pinned(self) -> dict[int, Pin]:
        if self._pins is None:
            pins = self._access.pin(self.reads.values())
            if pins:
                self._check_lease()
            self._pins = pins
        return self._pins

    def _check_lease(self) -> None:
        if not self._access.caller.run(ask("holds", self._lease.number, pack_keys(self._keys))):
            raise LeaseLost(
                f"the columns of {describe_keys(self._keys)} can't be read any more: lease {self._lease.number} of "
                f"{self._lease.consumer!r} does not hold them (acknowledged, released, past its deadline, or the step "
                "was closed); look at columns before the ack"
            )

    def select(self, rows: Sequence[int]) -> LazyColumns:
        """The same columns for some rows."""
        reads = {name: read.select(rows) for name, read in self.reads.items()}
        keys = [self._keys[row] for row in rows]
        return LazyColumns(reads, self._access, self._lease, keys, self.timeout, self._pins)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __getstate__(self) -> dict[str, Any]:
        # Values and locks stay here: the receiver reads from its own node's memory.
        return self.__dict__ | {"_values": {}, "_pins": None}


class Batch:
    """Samples leased to one consumer.

    `keys`: their names, in row order; `lease`: what `ack` and `release` give back; `ages` [S] int64: how many closed
    steps each sample was carried over; `columns[name]`: Jagged for rows of different lengths, ndarray [S, ...] for
    fixed-size ones, list for str and object columns.
    """

    def __init__(self, keys: Sequence[SampleKey], lease: Lease, ages: np.ndarray, columns: LazyColumns) -> None:
        self.keys, self.lease, self.ages, self.columns = tuple(keys), lease, ages, columns

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, parts: Sequence[Sequence[int]]) -> list[Batch]:
        """One batch for each list of row numbers, all under this lease; each can be acknowledged by itself.

        Raises: InvalidRequest for a row that does not exist or is in two parts.
        """
        rows = [row for part in parts for row in part]
        if len(set(rows)) != len(rows) or any(not 0 <= row < len(self) for row in rows):
            raise InvalidRequest(f"the parts of a split are distinct rows of 0..{len(self) - 1}, got {parts}")
        return [self._part(list(part)) for part in parts]

    def _part(self, rows: list[int]) -> Batch:
        keys = [self.keys[row] for row in rows]
        return Batch(keys, self.lease, self.ages[np.array(rows, np.int64)], self.columns.select(rows))

    def __repr__(self) -> str:
        return (
            f"Batch({self.lease.consumer}, lease {self.lease.number}, {len(self)} samples: {describe_keys(self.keys)})"
        )
