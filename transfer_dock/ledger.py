"""The dock's bookkeeping: who put what, who holds it, who is done. Plain data, no clock, no Ray, no payload."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transfer_dock.columns import ColumnRead, ColumnWrite, Layout
from transfer_dock.errors import (
    ColumnMismatch,
    ConflictingPut,
    DockTimeout,
    InvalidRequest,
    LeaseLost,
    StepClosed,
    UnknownColumn,
    UnknownConsumer,
    unknown_name,
)
from transfer_dock.keys import GroupKey, SampleKey, describe_keys, group_of
from transfer_dock.pool import Pool
from transfer_dock.records import Block, Group, LeaseRecord, Sample


class Ledger:
    """State of a dock. Times are seconds on the caller's monotonic clock; a method that raises has changed nothing.

    Args: dtypes of the columns by name; consumers: the columns that each reads; samples_per_group: samples that make a
    group complete; capacity_bytes: payload of unfinished samples and reservations; lease_timeout: seconds.
    """

    def __init__(
        self,
        dtypes: Mapping[str, str],
        consumers: Mapping[str, Sequence[str]],
        samples_per_group: int,
        capacity_bytes: int,
        lease_timeout: float,
    ) -> None:
        self.dtypes, self.samples_per_group, self.lease_timeout = dict(dtypes), samples_per_group, lease_timeout
        self.capacity_bytes = capacity_bytes
        self.bytes_held = self.bytes_reserved = 0
        self.consumers = {name: tuple(dict.fromkeys(reads)) for name, reads in consumers.items()}
        self.readers: dict[str, list[str]] = {column: [] for column in dtypes}
        for consumer, reads in self.consumers.items():
            for column in reads:
                if column not in dtypes:
                    raise UnknownColumn(f"consumer {consumer!r}: {unknown_name('column', column, dtypes)}")
                self.readers[column].append(consumer)
            if not reads:
                raise InvalidRequest(f"consumer {consumer!r} reads no column; a consumer reads at least one")
        self.samples: dict[SampleKey, Sample] = {}
        self.pools = {consumer: Pool(samples_per_group) for consumer in consumers}
        self.leases: dict[int, LeaseRecord] = {}
        self.column_counts = dict.fromkeys(dtypes, 0)
        self.groups_complete = dict.fromkeys(dtypes, 0)
        self.leased_counts = dict.fromkeys(consumers, 0)
        self.acked_counts = dict.fromkeys(consumers, 0)
        self._groups: dict[GroupKey, Group] = {}
        self._layouts: dict[str, Layout] = {}
        self._reservations: dict[int, int] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._last_ticket = 0
        self._closed_steps: set[int] = set()
        self._retired: dict[int, set[SampleKey]] = {}

    # ---- putting -----------------------------------------------------------------------------------------------

    def new_columns(self, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> list[str]:
        """The columns of a put that bring anything new; the others repeat what is there.

        Raises: UnknownColumn, ColumnMismatch, ConflictingPut, StepClosed, InvalidRequest.
        """
        self._check_keys(keys)
        found = []
        for column, write in writes.items():
            if column not in self.dtypes:
                raise UnknownColumn(unknown_name("column", column, self.dtypes))
            layout = self._layouts.get(column, write.layout)
            if layout != write.layout:
                raise ColumnMismatch(f"column {column!r} holds {layout} already, this put has {write.layout}")
            known = [self.samples[key].digests.get(column) if key in self.samples else None for key in keys]
            pairs = zip(keys, known, write.digests, strict=True)
            if conflicts := [key for key, old, new in pairs if old is not None and old != new]:
                raise ConflictingPut(f"column {column!r} was put before with another value: {describe_keys(conflicts)}")
            if None in known:
                found.append(column)
        return found

    def _check_keys(self, keys: Sequence[SampleKey]) -> None:
        if len(set(keys)) != len(keys):
            raise InvalidRequest("a key appears twice in one put")
        added: dict[GroupKey, set[int]] = {}
        for key in keys:
            if key.step in self._closed_steps or key in self._retired.get(key.step, ()):
                raise StepClosed(
                    f"{describe_keys([key])} left the dock when its step was closed; it can't be put again"
                )
            added.setdefault(group_of(key), set()).add(key.index)
        for group, indices in added.items():
            known = self._groups[group].indices if group in self._groups else set()
            if len(known | indices) > self.samples_per_group:
                text = f"step {group[0]} group {group[1]} would have {len(known | indices)} samples"
                raise InvalidRequest(f"{text}; the dock was created with samples_per_group={self.samples_per_group}")

    def reserve(self, nbytes: int, now: float) -> int | None:
        """Set `nbytes` aside, for `lease_timeout` at most, for a put to be written; None while the dock is too full."""
        if self.bytes_held + self.bytes_reserved + nbytes > self.capacity_bytes:
            return None
        ticket = self._ticket(now + self.lease_timeout)
        self._reservations[ticket] = nbytes
        self.bytes_reserved += nbytes
        return ticket

    def cancel(self, ticket: int) -> None:
        """Give a reservation back; nothing happens when it is over already."""
        self.bytes_reserved -= self._reservations.pop(ticket, 0)

    def commit(
        self, ticket: int, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite], refs: Mapping[str, Any]
    ) -> set[str]:
        """Make the columns in `refs` visible, spending the reservation. Returns the consumers that got samples.

        Raises: DockTimeout when the reservation is over, and what `new_columns` raises.
        """
        if ticket not in self._reservations:
            raise DockTimeout(f"the put of {describe_keys(keys)} was not written within {self.lease_timeout:g} s")
        new = set(self.new_columns(keys, writes))
        self.cancel(ticket)
        woken: set[str] = set()
        for column, ref in refs.items():
            if column in new:
                woken |= self._write(column, writes[column], ref, keys)
        return woken

    def _write(self, column: str, write: ColumnWrite, ref: Any, keys: Sequence[SampleKey]) -> set[str]:
        block, woken = Block(ref, write.nbytes), set()
        self._layouts[column] = write.layout
        for row, key in enumerate(keys):
            sample = self.samples.get(key) or self._open_sample(key)
            if column in sample.digests:
                continue
            sample.digests[column] = write.digests[row]
            group = self._groups[group_of(key)]
            group.columns[column] = group.columns.get(column, 0) + 1
            self.groups_complete[column] += group.columns[column] == self.samples_per_group
            self.column_counts[column] += 1
            if not self._is_finished(sample):
                sample.places[column] = (block, int(write.start[row]), int(write.length[row]))
                block.live += 1
            for consumer in self.readers[column]:
                sample.missing[consumer] -= 1
                if not sample.missing[consumer]:
                    self.pools[consumer].add(key)
                    woken.add(consumer)
        self.bytes_held += block.nbytes if block.live else 0
        return woken

    def _open_sample(self, key: SampleKey) -> Sample:
        sample = Sample({consumer: len(reads) for consumer, reads in self.consumers.items()})
        self.samples[key] = sample
        self._groups.setdefault(group_of(key), Group()).indices.add(key.index)
        return sample

    # ---- taking ------------------------------------------------------------------------------------------------

    def check_request(self, consumer: str, count: int, minimum: int, whole_groups: bool, step: int | None) -> None:
        if consumer not in self.consumers:
            raise UnknownConsumer(unknown_name("consumer", consumer, self.consumers))
        if not 1 <= minimum <= count:
            raise InvalidRequest(f"get({consumer!r}) needs 1 <= minimum <= count, got minimum={minimum}, count={count}")
        if whole_groups and (count % self.samples_per_group or minimum % self.samples_per_group):
            size = self.samples_per_group
            text = f"get({consumer!r}) of whole groups takes multiples of samples_per_group={size}"
            raise InvalidRequest(f"{text}, got count={count}, minimum={minimum}")
        if step in self._closed_steps:
            raise StepClosed(f"get({consumer!r}) asks for samples of step {step}, which is closed")

    def lease(
        self, consumer: str, count: int, minimum: int, whole_groups: bool, step: int | None, now: float
    ) -> tuple[int, list[SampleKey]] | None:
        """Hand out the lowest keys under a new lease (id, keys); None while there are fewer than `minimum`.

        Raises: UnknownConsumer, InvalidRequest, StepClosed.
        """
        self.check_request(consumer, count, minimum, whole_groups, step)
        keys = self.pools[consumer].choose(count, minimum, whole_groups, step)
        if keys is None:
            return None
        deadline = now + self.lease_timeout
        record = LeaseRecord(consumer, deadline, whole_groups, {}, {})
        ticket = self._ticket(deadline)
        for key in keys:
            self.pools[consumer].remove(key)
            self.samples[key].leased[consumer] = ticket
            record.units.setdefault(record.unit_of(key), []).append(key)
        record.pending = {unit: set(members) for unit, members in record.units.items()}
        self.leases[ticket] = record
        self.leased_counts[consumer] += len(keys)
        return ticket, keys

    def read(self, keys: Sequence[SampleKey], columns: Sequence[str]) -> dict[str, ColumnRead]:
        """Where the columns of leased samples lie."""
        found = {}
        for column in columns:
            places = [self.samples[key].places[column] for key in keys]
            # Held by identity: two blocks may wrap equal refs, and Block is mutable.
            numbers: dict[int, int] = {}
            refs: list[Any] = []
            for block, _, _ in places:
                if id(block) not in numbers:
                    numbers[id(block)] = len(refs)
                    refs.append(block.ref)
            found[column] = ColumnRead(
                self.dtypes[column],
                self._layouts[column],
                refs,
                np.array([numbers[id(block)] for block, _, _ in places], np.int64),
                np.array([start for _, start, _ in places], np.int64),
                np.array([length for _, _, length in places], np.int64),
            )
        return found

    def ack(self, consumer: str, ticket: int, keys: Sequence[SampleKey]) -> None:
        """The consumer is done with these samples for good; repeating it under the same lease changes nothing.

        Raises: LeaseLost when the lease does not hold one of them any more.
        """
        record = self.leases.get(ticket)
        if lost := [key for key in keys if not self._may_ack(record, consumer, ticket, key)]:
            raise LeaseLost(
                f"{consumer!r} acknowledged {describe_keys(lost)} under lease {ticket}, which lost them: it passed its "
                f"deadline of {self.lease_timeout:g} s, was released, or the step was closed"
            )
        if record is None:
            return
        for key in keys:
            pending = record.pending.get(record.unit_of(key), set())
            pending.discard(key)
            if not pending and record.holds(key):
                for member in self._end_unit(ticket, record, key):
                    self._finish(consumer, ticket, member)

    def _may_ack(self, record: LeaseRecord | None, consumer: str, ticket: int, key: SampleKey) -> bool:
        if record is not None and record.consumer == consumer and record.holds(key):
            return True
        return key in self.samples and self.samples[key].acked.get(consumer) == ticket

    def _finish(self, consumer: str, ticket: int, key: SampleKey) -> None:
        sample = self.samples[key]
        sample.acked[consumer] = ticket
        self.acked_counts[consumer] += 1
        if self._is_finished(sample):
            self._free(sample)

    def _is_finished(self, sample: Sample) -> bool:
        return len(sample.acked) == len(self.consumers)

    def _end_unit(self, ticket: int, record: LeaseRecord, key: SampleKey) -> list[SampleKey]:
        unit = record.unit_of(key)
        members = record.units.pop(unit)
        record.pending.pop(unit)
        for member in members:
            del self.samples[member].leased[record.consumer]
        self.leased_counts[record.consumer] -= len(members)
        if not record.units:
            del self.leases[ticket]
        return members

    def release(self, ticket: int, keys: Sequence[SampleKey]) -> set[str]:
        """Back to the pool, where the lease still holds them. Returns the consumers that got samples."""
        record = self.leases.get(ticket)
        if record is None:
            return set()
        returned = [member for key in keys if record.holds(key) for member in self._end_unit(ticket, record, key)]
        for key in returned:
            self.pools[record.consumer].add(key)
        return {record.consumer} if returned else set()

    # ---- time and steps ----------------------------------------------------------------------------------------

    def _ticket(self, deadline: float) -> int:
        self._last_ticket += 1
        heapq.heappush(self._deadlines, (deadline, self._last_ticket))
        return self._last_ticket

    def _is_open(self, ticket: int) -> bool:
        return ticket in self.leases or ticket in self._reservations

    def next_deadline(self) -> float | None:
        """When the first open lease or reservation ends by itself."""
        while self._deadlines and not (
            self._deadlines[0][1] in self.leases or self._deadlines[0][1] in self._reservations
        ):
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def expire(self, now: float) -> set[str]:
        """End the leases and reservations whose deadline is `now` or before. Returns the consumers that got samples."""
        woken: set[str] = set()
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            ticket = self._deadlines[0][1]
            self.cancel(ticket)
            if ticket in self.leases:
                woken |= self.release(ticket, [members[0] for members in self.leases[ticket].units.values()])
        return woken

    def close_step(self, step: int, carry_unfinished: bool) -> int:
        """Drop the step's samples; with `carry_unfinished` only those that every consumer acknowledged.

        Returns the number of dropped samples. Without `carry_unfinished` nothing can be put into the step any more.
        """
        keys = [key for key in self.samples if key.step == step]
        if carry_unfinished:
            keys = [key for key in keys if self._is_finished(self.samples[key])]
            self._retired.setdefault(step, set()).update(keys)
        else:
            self._closed_steps.add(step)
            self._retired.pop(step, None)
        # Every lease on them ends first, so that a sample to drop is acknowledged, in a pool, or lacks columns.
        for key in keys:
            for ticket in list(self.samples[key].leased.values()):
                self.release(ticket, [key])
        for key in keys:
            self._drop(key)
        if not carry_unfinished:
            for group in [group for group in self._groups if group[0] == step]:
                del self._groups[group]
        return len(keys)

    def _drop(self, key: SampleKey) -> None:
        sample = self.samples.pop(key)
        for consumer, missing in sample.missing.items():
            if consumer in sample.acked:
                self.acked_counts[consumer] -= 1
            elif not missing:
                self.pools[consumer].remove(key)
        group = self._groups[group_of(key)]
        for column in sample.digests:
            self.groups_complete[column] -= group.columns[column] == self.samples_per_group
            group.columns[column] -= 1
            self.column_counts[column] -= 1
            if not self.column_counts[column]:
                del self._layouts[column]
        self._free(sample)

    def _free(self, sample: Sample) -> None:
        for block, _, _ in sample.places.values():
            block.live -= 1
            self.bytes_held -= block.nbytes if not block.live else 0
        sample.places.clear()

    def status(self) -> dict[str, Any]:
        """Counts over the samples that the dock holds; plain numbers, no sample is visited."""
        return {
            "samples": len(self.samples),
            "columns": dict(self.column_counts),
            "groups_complete": dict(self.groups_complete),
            "consumers": {
                consumer: {
                    "ready": len(self.pools[consumer].keys),
                    "leased": self.leased_counts[consumer],
                    "acked": self.acked_counts[consumer],
                }
                for consumer in self.consumers
            },
            "bytes_held": self.bytes_held,
            "bytes_reserved": self.bytes_reserved,
            "capacity_bytes": self.capacity_bytes,
        }
