"""All state of a dock and the transitions that change it: deterministic, no clock, all arguments are data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_dock import snapshot
from transfer_dock.columns import ColumnWrite, Layout
from transfer_dock.keys import GroupKey, SampleKey, unpack_keys
from transfer_dock.memory import Memory
from transfer_dock.pool import Pool
from transfer_dock.records import (
    DROPPED,
    Block,
    Group,
    Holder,
    LeaseRecord,
    ReservationRecord,
    Sample,
    Settings,
    Tag,
    as_holder,
)

KINDS = ("reserve", "move", "cancel", "commit", "lease", "claim", "ack", "release", "drop", "close", "restore")
# Processes that are remembered for each column as those who put it, the latest ones.
PRODUCERS = 16


class Book:
    """What the ledger decides on. A transition trusts its arguments: the ledger has checked them before recording it.

    Keys come packed ([S, 3] int64), columns as ColumnWrite.as_data(), holders as [node, pid, started] or None.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.readers: dict[str, list[str]] = {column: [] for column in settings.dtypes}
        for consumer, reads in settings.consumers.items():
            for column in reads:
                self.readers[column].append(consumer)
        self.last_ticket = 0
        self.samples: dict[SampleKey, Sample] = {}
        self.groups: dict[GroupKey, Group] = {}
        self.layouts: dict[str, Layout] = {}
        self.closed_steps: set[int] = set()
        self.last_request = (b"", 0)  # of the last close or restore, and its answer
        self.producers: dict[str, dict[Holder, None]] = {}
        self.reservations: dict[int, ReservationRecord] = {}
        self.leases: dict[int, LeaseRecord] = {}
        self.memory = Memory()
        # What follows is derived from the above.
        self.pools = {consumer: Pool(settings.samples_per_group) for consumer in settings.consumers}
        self.requests: dict[tuple[str | None, bytes], int] = {}
        self.unclaimed: dict[Tag, dict[int, None]] = {}
        self.held_by: dict[Holder, set[int]] = {}
        self.open_groups: Counter[GroupKey] = Counter()  # unfinished samples, and reservations that enter
        self.ages: Counter[int] = Counter()  # groups that hold samples
        self.bytes_reserved = 0
        self.column_counts = dict.fromkeys(settings.dtypes, 0)
        self.groups_complete = dict.fromkeys(settings.dtypes, 0)
        self.leased_counts = dict.fromkeys(settings.consumers, 0)
        self.acked_counts = dict.fromkeys(settings.consumers, 0)
        self.dropped_counts = dict.fromkeys(settings.consumers, 0)

    def apply(self, kind: str, args: Sequence[Any]) -> Any:
        """Do one transition. Returns the consumers that got samples; of "close" the number of dropped samples."""
        if kind not in KINDS:
            raise ValueError(f"a book has no transition {kind!r}")
        return getattr(self, f"_{kind}")(*args)

    def state(self) -> dict[str, Any]:
        """Everything as plain data; equal for books that behave equally."""
        return snapshot.save(self)

    @classmethod
    def load(cls, settings: Settings, state: Mapping[str, Any]) -> Book:
        book = cls(settings)
        snapshot.load(book, state)
        return book

    # ---- putting -----------------------------------------------------------------------------------------------

    def _reserve(
        self,
        ticket: int,
        columns: list[str],
        nbytes: int,
        node: str,
        offset: int | None,
        size: int,
        holder: Any,
        request_id: bytes,
        entering: np.ndarray,
    ) -> None:
        """`entering` [G, 2]: the groups into which the put brings samples."""
        extent = None if offset is None else self.memory.hold(node, offset, size)
        groups = [(step, group) for step, group in entering.tolist()]
        record = ReservationRecord(columns, nbytes, node, size, extent, as_holder(holder), request_id, groups)
        self.last_ticket = max(self.last_ticket, ticket)
        self.reservations[ticket] = record
        self.bytes_reserved += nbytes
        self.open_groups.update(groups)
        self._own(ticket, record, None)

    def _leave_group(self, group: GroupKey) -> None:
        self.open_groups[group] -= 1
        if not self.open_groups[group]:
            del self.open_groups[group]

    def _own(self, ticket: int, record: LeaseRecord | ReservationRecord, consumer: str | None) -> None:
        """Index whose it is; reservations have no consumer."""
        if record.holder is not None:
            self.held_by.setdefault(record.holder, set()).add(ticket)
        if record.request_id:
            self.requests[consumer, record.request_id] = ticket

    def _disown(self, ticket: int, record: LeaseRecord | ReservationRecord, consumer: str | None) -> None:
        if record.holder is not None:
            self.held_by[record.holder].discard(ticket)
            if not self.held_by[record.holder]:
                del self.held_by[record.holder]
        self.requests.pop((consumer, record.request_id), None)

    def _end_reservation(self, ticket: int) -> ReservationRecord:
        record = self.reservations.pop(ticket)
        self.bytes_reserved -= record.nbytes
        for group in record.entering:
            self._leave_group(group)
        self._disown(ticket, record, None)
        return record

    def _move(self, ticket: int, offset: int | None) -> None:
        record = self.reservations[ticket]
        if record.extent is not None:
            self.memory.free(record.extent)
        record.extent = None if offset is None else self.memory.hold(record.node, offset, record.size)

    def _cancel(self, ticket: int) -> None:
        if (extent := self._end_reservation(ticket).extent) is not None:
            self.memory.free(extent)

    def _commit(self, ticket: int, packed: np.ndarray, columns: Sequence[Sequence[Any]]) -> set[str]:
        """`columns`: name, offset in the extent and ColumnWrite of each one that brings something new."""
        reservation = self._end_reservation(ticket)
        extent = reservation.extent
        assert extent is not None
        keys = unpack_keys(packed) if columns else []
        rows = [(key, self.samples.get(key) or self._open_sample(key), self.groups[key[:2]]) for key in keys]
        ready: dict[str, list[SampleKey]] = {consumer: [] for consumer in self.settings.consumers}
        for column, offset, data in columns:
            write = ColumnWrite.from_data(data)
            block = Block(extent, column, extent.offset + offset, write.nbytes)
            self._write(column, write, block, rows, ready)
            producers = self.producers.setdefault(column, {})
            if reservation.holder is not None:
                producers.pop(reservation.holder, None)
                producers[reservation.holder] = None
                if len(producers) > PRODUCERS:
                    del producers[next(iter(producers))]
        if not extent.live:
            self.memory.free(extent)
        for consumer, found in ready.items():
            self.pools[consumer].add(found)
        return {consumer for consumer, found in ready.items() if found}

    def _write(
        self,
        column: str,
        write: ColumnWrite,
        block: Block,
        rows: Iterable[tuple[SampleKey, Sample, Group]],
        ready: dict[str, list[SampleKey]],
    ) -> None:
        self.layouts[column] = write.layout
        start, length, readers, size = write.start, write.length, self.readers[column], self.settings.samples_per_group
        digests = [write.digest(row) for row in range(len(start))]
        added = live = complete = 0
        places = zip(rows, digests, start.tolist(), length.tolist(), strict=True)
        for (key, sample, group), digest, first, count in places:
            if column in sample.digests:
                continue
            sample.digests[column] = digest
            added += 1
            having = group.columns[column] = group.columns.get(column, 0) + 1
            complete += having == size
            if sample.left:
                sample.places[column] = (block, first, count)
                live += 1
            missing = sample.missing
            for consumer in readers:
                missing[consumer] -= 1
                if not missing[consumer]:
                    ready[consumer].append(key)
        self.column_counts[column] += added
        self.groups_complete[column] += complete
        self.memory.need(block, live)

    def _open_sample(self, key: SampleKey) -> Sample:
        consumers = self.settings.consumers
        sample = Sample({consumer: len(reads) for consumer, reads in consumers.items()}, len(consumers))
        self.samples[key] = sample
        name: GroupKey = key[:2]
        group = self.groups.get(name)
        if group is None:
            group = self.groups[name] = Group()
        if not group.held:
            self.ages[group.age] += 1
        group.held += 1
        group.indices.add(key[2])
        if consumers:
            self.open_groups[name] += 1
        return sample

    # ---- taking ------------------------------------------------------------------------------------------------

    def _lease(
        self,
        consumer: str,
        whole_groups: bool,
        holder: Any,
        request_id: bytes,
        tag: Sequence[Any] | None,
        parts: Sequence[tuple[int, np.ndarray, int | None]],
    ) -> None:
        """`parts`: ticket, keys and rank of each new lease; with a tag they are unclaimed."""
        for ticket, packed, rank in parts:
            keys = unpack_keys(packed)
            self.pools[consumer].remove(keys)
            units: dict[GroupKey, list[SampleKey]] = {}
            for key in keys:
                self.samples[key].leased[consumer] = ticket
                if whole_groups:
                    units.setdefault(key[:2], []).append(key)
            part = None if tag is None else Tag(*tag)._replace(rank=rank)
            owner, held = as_holder(holder), dict.fromkeys(keys)
            record = LeaseRecord(consumer, whole_groups, owner, request_id, part, held, units)
            self.last_ticket = max(self.last_ticket, ticket)
            self.leases[ticket] = record
            self.leased_counts[consumer] += len(keys)
            if part is not None:
                self.unclaimed.setdefault(part, {})[ticket] = None
            self._own(ticket, record, consumer)

    def _claim(self, ticket: int, holder: Any, request_id: bytes) -> None:
        record = self.leases[ticket]
        self._withdraw(ticket, record)
        record.holder, record.request_id = as_holder(holder), request_id
        self._own(ticket, record, record.consumer)

    def _withdraw(self, ticket: int, record: LeaseRecord) -> None:
        """Nobody can claim the lease any more."""
        if record.tag is not None:
            tickets = self.unclaimed[record.tag]
            del tickets[ticket]
            if not tickets:
                del self.unclaimed[record.tag]
            record.tag = None

    def _ack(self, consumer: str, ticket: int, packed: np.ndarray) -> None:
        """The lease holds each of these keys, none of them twice."""
        record, keys = self.leases[ticket], unpack_keys(packed)
        self._withdraw(ticket, record)
        if record.whole_groups:
            record.partly.update(keys)
            groups = dict.fromkeys(key[:2] for key in keys)
            members = [record.units[group] for group in groups if record.partly.issuperset(record.units[group])]
            keys = [key for unit in members for key in unit]
        self._end(ticket, record, keys)
        self._finish(consumer, ticket, keys)
        self.acked_counts[consumer] += len(keys)

    def _finish(self, consumer: str, mark: int, keys: Iterable[SampleKey]) -> None:
        for key in keys:
            sample = self.samples[key]
            sample.acked[consumer] = mark
            sample.left -= 1
            if not sample.left:
                self.memory.forget(sample)
                self._leave_group(key[:2])

    def _end(self, ticket: int, record: LeaseRecord, keys: Sequence[SampleKey]) -> None:
        """The lease holds these samples (with whole groups, all of some groups) no more."""
        held, consumer = record.held, record.consumer
        for key in keys:
            del held[key], self.samples[key].leased[consumer]
        if record.whole_groups:
            record.partly.difference_update(keys)
            for group in dict.fromkeys(key[:2] for key in keys):
                del record.units[group]
        self.leased_counts[consumer] -= len(keys)
        if not held:
            self._withdraw(ticket, record)
            del self.leases[ticket]
            self._disown(ticket, record, consumer)

    def _release(self, ticket: int, packed: np.ndarray | None) -> set[str]:
        """These keys, which the lease holds (None: all that it holds), go back to the pool."""
        record = self.leases[ticket]
        self._withdraw(ticket, record)
        keys = list(record.held) if packed is None else unpack_keys(packed)
        if record.whole_groups:
            keys = [key for group in dict.fromkeys(key[:2] for key in keys) for key in record.units[group]]
        self._end(ticket, record, keys)
        self.pools[record.consumer].add(keys)
        return {record.consumer}

    def _drop(self, consumer: str, packed: np.ndarray) -> None:
        """Available samples are finished for the consumer, unread."""
        keys = unpack_keys(packed)
        self.pools[consumer].remove(keys)
        self._finish(consumer, DROPPED, keys)
        self.dropped_counts[consumer] += len(keys)

    # ---- steps -------------------------------------------------------------------------------------------------

    def members(self, group: GroupKey) -> list[SampleKey]:
        """The samples of a group that the dock holds."""
        keys = (SampleKey(*group, index) for index in sorted(self.groups[group].indices))
        return [key for key in keys if key in self.samples]

    def _close(self, step: int, carry_unfinished: bool, request_id: bytes) -> int:
        groups = [group for group in self.groups if group[0] == step]
        keys = [key for group in groups for key in self.members(group)]
        if carry_unfinished:
            keys = [key for key in keys if not self.samples[key].left]
        else:
            self.closed_steps.add(step)
        # Every lease on them ends first, so that a sample to drop is finished, in a pool, or lacks columns.
        for key in keys:
            for ticket in list(self.samples[key].leased.values()):
                record = self.leases[ticket]
                # A part of a plan is claimed as it was planned or not at all.
                self._release(ticket, None if record.tag is not None else np.array([key], np.int64))
        self._remove(keys)
        if carry_unfinished:
            self._grow_older(step)
        else:
            for group in groups:
                del self.groups[group]
        self.last_request = (request_id, len(keys))
        return len(keys)

    def _remove(self, keys: Iterable[SampleKey]) -> None:
        waiting: dict[str, list[SampleKey]] = {consumer: [] for consumer in self.pools}
        for key in keys:
            sample = self.samples.pop(key)
            for consumer, missing in sample.missing.items():
                if (mark := sample.acked.get(consumer)) is not None:
                    counts = self.dropped_counts if mark == DROPPED else self.acked_counts
                    counts[consumer] -= 1
                elif not missing:
                    waiting[consumer].append(key)
            group = self.groups[key[:2]]
            for column in sample.digests:
                self.groups_complete[column] -= group.columns[column] == self.settings.samples_per_group
                group.columns[column] -= 1
                self.column_counts[column] -= 1
                if not self.column_counts[column]:
                    del self.layouts[column]
            group.held -= 1
            if not group.held:
                self.ages -= Counter([group.age])
                group.age = 0
            if sample.left:
                self.memory.forget(sample)
                self._leave_group(key[:2])
        for consumer, found in waiting.items():
            self.pools[consumer].remove(found)

    def _grow_older(self, step: int) -> None:
        for name, group in self.groups.items():
            if name[0] <= step and group.held:
                group.age += 1
        self.ages = Counter(group.age for group in self.groups.values() if group.held)
        for tag, tickets in list(self.unclaimed.items()):
            for ticket in list(tickets):
                groups = {key[:2] for key in self.leases[ticket].held}
                if tag.max_staleness is not None and any(self.groups[name].age > tag.max_staleness for name in groups):
                    self._release(ticket, None)

    # ---- restoring ---------------------------------------------------------------------------------------------

    def _restore(self, state: Mapping[str, Any], moved: Sequence[Sequence[Any]], request_id: bytes) -> set[str]:
        """Take over the samples of another book's state. `moved`: node and offset of an extent there, and here. Its
        leases and reservations are over: what they held is available."""
        sizes = {(node, offset): size for node, offset, size in state["extents"]}
        extents = {(old, at): self.memory.hold(node, to, sizes[old, at]) for old, at, node, to in moved}
        snapshot.load_samples(self, state, extents)
        for extent in extents.values():
            if not extent.live:
                self.memory.free(extent)
        self.last_ticket = max(self.last_ticket, state["ticket"])
        self.last_request = (request_id, 0)
        return {consumer for consumer, pool in self.pools.items() if pool.size}
