"""Samples under a lease: small to send around, its payload is read where and when it is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import RayError

from transfer_dock.columns import ColumnRead, decode
from transfer_dock.errors import InvalidRequest, PayloadLost, UnknownColumn, unknown_name
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey, describe_keys


class Lease(NamedTuple):
    """The right to work on samples: the number of the grant (it fences late acknowledgements) and its consumer."""

    number: int
    consumer: str


class LazyColumns(Mapping[str, Any]):
    """Column name -> values, read from the object store at the first look. Iterating names reads nothing."""

    def __init__(self, reads: Mapping[str, ColumnRead], timeout: float) -> None:
        self.reads, self.timeout = dict(reads), timeout
        self._values: dict[str, Jagged | np.ndarray | list[Any]] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            if name not in self.reads:
                raise UnknownColumn(unknown_name("column for this consumer", name, self.reads))
            self._values[name] = decode(self.reads[name], lambda refs: self._fetch(name, refs))
        return self._values[name]

    def _fetch(self, name: str, refs: list[Any]) -> list[np.ndarray]:
        try:
            return ray.get(refs, timeout=self.timeout)
        except RayError as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise PayloadLost(
                f"column {name!r} can't be read; did a process that put it end or crash? ({reason})"
            ) from error

    def select(self, rows: Sequence[int]) -> LazyColumns:
        """The same columns for some rows."""
        return LazyColumns({name: read.select(rows) for name, read in self.reads.items()}, self.timeout)

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)

    def __getstate__(self) -> dict[str, Any]:
        # Values stay here: the receiver reads them from its own node's memory.
        return self.__dict__ | {"_values": {}}


class Batch:
    """Samples leased to one consumer.

    `keys`: their names, in row order; `lease`: what `ack` and `release` give back; `columns[name]`: Jagged for rows of
    different lengths, ndarray [S, ...] for fixed-size ones, list for str and object columns.
    """

    def __init__(self, keys: Sequence[SampleKey], lease: Lease, columns: LazyColumns) -> None:
        self.keys, self.lease, self.columns = tuple(keys), lease, columns

    def __len__(self) -> int:
        return len(self.keys)

    def split(self, parts: Sequence[Sequence[int]]) -> list[Batch]:
        """One batch for each list of row numbers, all under this lease; each can be acknowledged by itself.

        Raises: InvalidRequest for a row that does not exist or is in two parts.
        """
        rows = [row for part in parts for row in part]
        if len(set(rows)) != len(rows) or any(not 0 <= row < len(self) for row in rows):
            raise InvalidRequest(f"the parts of a split are distinct rows of 0..{len(self) - 1}, got {parts}")
        return [Batch([self.keys[row] for row in part], self.lease, self.columns.select(part)) for part in parts]

    def __repr__(self) -> str:
        return (
            f"Batch({self.lease.consumer}, lease {self.lease.number}, {len(self)} samples: {describe_keys(self.keys)})"
        )
