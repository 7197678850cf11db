"""The dock's decisions: who may put what where, who gets which samples, what is over. No Ray, no payload, no clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_dock import checks
from transfer_dock.book import Book
from transfer_dock.choice import choose_parts, choose_samples, read_columns, stale_samples
from transfer_dock.columns import ColumnRead, ColumnWrite, lay_out
from transfer_dock.errors import DockTimeout, InvalidRequest, LeaseLost
from transfer_dock.keys import SampleKey, describe_keys, pack_keys
from transfer_dock.records import DROPPED, Grant, Holder, LeaseRequest, Reservation, Settings
from transfer_dock.spaces import Spaces

Record = Callable[[str, list[Any]], object]


class Ledger:
    """Decides, and has its book do what was decided; `record` gets each transition (kind, arguments) before it is done.

    Times are seconds on the caller's monotonic clock; a holder is [node, pid, start time] of the process that puts or
    gets, or None. A method that raises has recorded and changed nothing.
    """

    def __init__(self, settings: Settings, record: Record | None = None) -> None:
        self.settings, self.record = settings, record
        self.book = Book(settings)
        self.spaces = Spaces(settings.capacity_bytes)
        self._deadlines: dict[int, float] = {}
        self._ends: list[tuple[float, int]] = []

    @classmethod
    def replay(
        cls,
        settings: Settings,
        state: Mapping[str, Any] | None,
        records: Iterable[tuple[str, Sequence[Any]]],
        now: float,
        record: Record | None = None,
    ) -> Ledger:
        """The ledger of a process that ended: its book's last saved state, and the transitions recorded after that.

        Open leases and reservations get a new deadline.
        """
        ledger = cls(settings, record)
        if state is not None:
            ledger.book = Book.load(settings, state)
        for kind, args in records:
            ledger.book.apply(kind, args)
        ledger.book.memory.take_freed()
        ledger.spaces.take(ledger.book.memory)
        for ticket in sorted([*ledger.book.leases, *ledger.book.reservations]):
            ledger._lasts(ticket, now)
        return ledger

    def _do(self, kind: str, *args: Any) -> Any:
        if self.record is not None:
            self.record(kind, list(args))
        result = self.book.apply(kind, args)
        for node, offset in self.book.memory.take_freed():
            self.spaces.free(node, offset)
        return result

    # ---- putting -----------------------------------------------------------------------------------------------

    def new_columns(self, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> list[str]:
        """The columns of a put that bring anything new; the others repeat what is there.

        Raises: UnknownColumn, ColumnMismatch, ConflictingPut, StepClosed, InvalidRequest.
        """
        checks.check_keys(self.book, keys)
        return checks.new_columns(self.book, keys, writes)

    def check_put(self, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> list[str]:
        """`new_columns`, and whether the dock could ever have room for them. Raises: InvalidRequest when not."""
        columns = self.new_columns(keys, writes)
        checks.check_size(self.book, keys, writes, columns, self.spaces.size)
        return columns

    def lacks_room(self, keys: Sequence[SampleKey], nbytes: int) -> str | None:
        """Which of its limits keeps the dock from taking a put now: "bytes", "groups", or None."""
        if self.book.memory.bytes_held + self.book.bytes_reserved + nbytes > self.settings.capacity_bytes:
            return "bytes"
        if self.settings.capacity_groups is None:
            return None
        opened, more = self.book.open_groups, self.groups_to_open(keys)
        return "groups" if more and len(opened) + more > self.settings.capacity_groups else None

    def groups_to_open(self, keys: Sequence[SampleKey]) -> int:
        return sum(group not in self.book.open_groups for group in checks.entered_groups(self.book, keys))

    def wants_digests(self, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> bool:
        """Whether a put without digests repeats something, and can be judged only with them."""
        return checks.wants_digests(self.book, keys, writes)

    def reserve(
        self,
        keys: Sequence[SampleKey],
        writes: Mapping[str, ColumnWrite],
        columns: Sequence[str],
        node: str,
        holder: Sequence[Any] | None,
        now: float,
        request_id: bytes = b"",
    ) -> Reservation | None:
        """Memory on `node` for the new `columns` of a put, for `lease_timeout` at most; None while there is no room.

        Without columns there is nothing to write: the reservation has ticket 0, and nothing is reserved. A request id
        (not empty) asked again gets the same reservation, with a new deadline, as long as that is open.
        """
        if not columns:
            return Reservation(0, [], node, 0, 0)
        if (ticket := self.book.requests.get((None, request_id))) is not None:
            record = self.book.reservations[ticket]
            # The writer counts its time from this answer.
            self._lasts(ticket, now)
            if record.extent is None:
                return self.move(ticket, now)
            return Reservation(ticket, record.columns, record.node, record.extent.offset, record.size)
        nbytes = sum(int(writes[column].nbytes) for column in columns)
        if self.lacks_room(keys, nbytes):
            return None
        entered = np.array(checks.entered_groups(self.book, keys), np.int64).reshape(-1, 2)
        size, ticket = lay_out(writes, columns)[1], self.book.last_ticket + 1
        self.spaces.settle(now)
        with self.spaces.allocation(node, size) as offset:
            if offset is None:
                return None
            args = [ticket, list(columns), nbytes, node, offset, size, _plain(holder), request_id, entered]
            self._do("reserve", *args)
        self._lasts(ticket, now)
        return Reservation(ticket, list(columns), node, offset, size)

    def move(self, ticket: int, now: float) -> Reservation | None:
        """Another extent for a reservation whose extent is still looked at by somebody; None when there is none now.

        Either way the busy one is not handed out for PARKED_SECONDS. Raises: DockTimeout when the reservation is over.
        """
        record = self.book.reservations.get(ticket)
        if record is None:
            raise DockTimeout(f"a put was not written within {self.settings.lease_timeout:g} s")
        self.spaces.settle(now)
        with self.spaces.allocation(record.node, record.size) as offset:
            if record.extent is not None:
                busy = record.extent.offset
                with self.spaces.parking(record.node, busy, now):
                    self._do("move", ticket, offset)
            elif offset is not None:
                self._do("move", ticket, offset)
        return None if offset is None else Reservation(ticket, record.columns, record.node, offset, record.size)

    def cancel(self, ticket: int) -> None:
        """Give a reservation back; nothing happens when it is over already."""
        if ticket in self.book.reservations:
            self._do("cancel", ticket)

    def commit(self, ticket: int, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> set[str]:
        """Make a written put visible, spending its reservation. Returns the consumers that got samples.

        Raises: DockTimeout when the reservation is over and not all of the put is there, and what `new_columns` raises.
        """
        record = self.book.reservations.get(ticket)
        if record is None:
            if not self.new_columns(keys, writes):
                return set()  # a repeated commit, or an equal put came first
            text = f"the put of {describe_keys(SampleKey(*key) for key in keys)} was not written"
            raise DockTimeout(f"{text} within {self.settings.lease_timeout:g} s")
        new = set(self.new_columns(keys, writes))
        if not set(record.columns) <= set(writes) or record.extent is None:
            raise InvalidRequest(f"the put under reservation {ticket} has not written {', '.join(record.columns)}")
        offsets, size = lay_out(writes, record.columns)
        if size != record.size:
            raise InvalidRequest(f"the put under reservation {ticket} has {size} bytes, it reserved {record.size}")
        columns = [[name, offsets[name], writes[name].as_data()] for name in record.columns if name in new]
        return self._do("commit", ticket, pack_keys(keys), columns)

    # ---- taking ------------------------------------------------------------------------------------------------

    def check_request(self, request: LeaseRequest) -> None:
        """Raises: UnknownConsumer, InvalidRequest, StepClosed when no lease can ever come of the request."""
        checks.check_request(self.book, request)

    def lease(self, request: LeaseRequest, holder: Sequence[Any] | None, now: float) -> Grant | None:
        """Hand out what the request asks for under a lease; None while there are too few samples.

        Also then samples that it wants dropped are. Raises: what `check_request` raises.
        """
        self.check_request(request)
        ticket = self.book.requests.get((request.consumer, request.request_id)) if request.request_id else None
        if ticket is None:
            if stale := stale_samples(self.book, request):
                self._do("drop", request.consumer, pack_keys(stale))
            take = self._claim_part if request.balance else self._lease_samples
            ticket = take(request, _plain(holder), now)
        if ticket is None:
            return None
        keys = list(self.book.leases[ticket].held)
        return Grant(ticket, keys, [self.book.groups[key[:2]].age for key in keys])

    def _lease_samples(self, request: LeaseRequest, holder: Any, now: float) -> int | None:
        keys = choose_samples(self.book, request)
        if keys is None:
            return None
        ticket = self.book.last_ticket + 1
        parts = [[ticket, pack_keys(keys), None]]
        self._do("lease", request.consumer, request.whole_groups, holder, request.request_id, None, parts)
        self._lasts(ticket, now)
        return ticket

    def _claim_part(self, request: LeaseRequest, holder: Any, now: float) -> int | None:
        tag = request.tag()
        if tag not in self.book.unclaimed:
            plan = choose_parts(self.book, request)
            if plan is None:
                return None
            first = self.book.last_ticket + 1
            parts = [
                [first + number, pack_keys(keys), None if request.ranks is None else number]
                for number, keys in enumerate(plan)
            ]
            self._do("lease", request.consumer, request.whole_groups, None, b"", list(tag), parts)
            for number in range(len(plan)):
                self._lasts(first + number, now)
        ticket = next(iter(self.book.unclaimed[tag]))
        self._do("claim", ticket, holder, request.request_id)
        self._lasts(ticket, now)
        return ticket

    def holds(self, ticket: int, keys: Sequence[SampleKey]) -> bool:
        """Whether all these samples are under this lease still."""
        record = self.book.leases.get(ticket)
        return record is not None and all(key in record.held for key in keys)

    def read(self, keys: Sequence[SampleKey], columns: Sequence[str]) -> dict[str, ColumnRead]:
        """Where the columns of leased samples lie."""
        return read_columns(self.book, keys, columns)

    def ack(self, consumer: str, ticket: int, keys: Sequence[SampleKey]) -> None:
        """The consumer is done with these samples for good; repeating it under the same lease changes nothing.

        Raises: LeaseLost when the lease does not hold one of them any more.
        """
        record = self.book.leases.get(ticket)
        held = record.held if record is not None and record.consumer == consumer else {}
        samples, ours = self.book.samples, []
        lost = []
        for key in keys:
            if key in held:
                ours.append(key)
            elif ticket == DROPPED or key not in samples or samples[key].acked.get(consumer) != ticket:
                lost.append(SampleKey(*key))
        if lost:
            raise LeaseLost(
                f"{consumer!r} acknowledged {describe_keys(lost)} under lease {ticket}, which lost them: it passed its "
                f"deadline of {self.settings.lease_timeout:g} s, was released, or the step was closed"
            )
        if ours:
            self._do("ack", consumer, ticket, pack_keys(list(dict.fromkeys(ours))))

    def release(self, ticket: int, keys: Sequence[SampleKey]) -> set[str]:
        """Back to the pool, where the lease still holds them. Returns the consumers that got samples."""
        record = self.book.leases.get(ticket)
        held = [key for key in dict.fromkeys(keys) if record is not None and key in record.held]
        return self._do("release", ticket, pack_keys(held)) if held else set()

    # ---- processes, time and steps -----------------------------------------------------------------------------

    def holders(self) -> list[Holder]:
        """The processes that have a lease or a reservation."""
        return list(self.book.held_by)

    def withdraw(self, request_id: bytes) -> set[str]:
        """The put or get with this id isn't wanted any more. Returns the consumers that got samples."""
        asked = [self.book.requests.get((name, request_id)) for name in (None, *self.settings.consumers)]
        return self._end(ticket for ticket in asked if ticket is not None)

    def end_holder(self, holder: Sequence[Any], now: float) -> set[str]:
        """The process is gone: what it held is over. Returns the consumers that got samples."""
        self.spaces.settle(now)
        return self._end(sorted(self.book.held_by.get((holder[0], holder[1], holder[2]), ())))

    def _end(self, tickets: Iterable[int]) -> set[str]:
        woken: set[str] = set()
        for ticket in tickets:
            if ticket in self.book.leases:
                woken |= self._do("release", ticket, None)
            else:
                self.cancel(ticket)
        return woken

    def _lasts(self, ticket: int, now: float) -> None:
        self._deadlines[ticket] = now + self.settings.lease_timeout
        heapq.heappush(self._ends, (self._deadlines[ticket], ticket))

    def _first_end(self) -> tuple[float, int] | None:
        while self._ends:
            deadline, ticket = self._ends[0]
            is_open = ticket in self.book.leases or ticket in self.book.reservations
            if is_open and self._deadlines[ticket] == deadline:
                return deadline, ticket
            heapq.heappop(self._ends)
            if not is_open:
                self._deadlines.pop(ticket, None)
        return None

    def next_deadline(self) -> float | None:
        """When the first open lease or reservation ends by itself, or memory that was busy can be tried again."""
        first = self._first_end()
        ends = [] if first is None else [first[0]]
        if (parked := self.spaces.next_end()) is not None:
            ends.append(parked)
        return min(ends, default=None)

    def expire(self, now: float) -> set[str]:
        """End the leases and reservations whose deadline is `now` or before. Returns the consumers that got samples."""
        woken: set[str] = set()
        self.spaces.settle(now)
        while (first := self._first_end()) is not None and first[0] <= now:
            woken |= self._end([first[1]])
        return woken

    def close_step(self, step: int, carry_unfinished: bool, request_id: bytes = b"") -> int:
        """Drop the step's samples; with `carry_unfinished` only those that every consumer acknowledged.

        Then groups of this and earlier steps that hold samples still are older by one; otherwise nothing can be put
        into the step any more. Parts of balanced plans that nobody claimed go back where they lost a sample or became
        too old. Returns the number of dropped samples; asked again by the same `request_id` it does nothing more.
        """
        done, dropped = self.book.last_request
        return dropped if request_id and request_id == done else self._do("close", step, carry_unfinished, request_id)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def pin(self) -> int:
        """Extents that are needed now are not written over until `unpin` of the returned number."""
        return self.spaces.pin(self.book.memory)

    def unpin(self, number: int) -> None:
        self.spaces.unpin(number)

    def restore(
        self, state: Mapping[str, Any], moved: Sequence[tuple[str, int, str, int]], request_id: bytes = b""
    ) -> set[str]:
        """Take over a saved dock's samples, with what was acknowledged, into a dock that has none yet.

        What was leased or being written then is not: leased samples are available. Args: state: of its book; moved:
        node and offset of each saved extent with live blocks, and the node and offset here at which its bytes are now.
        Returns the consumers that got samples; asked again by the same `request_id` it does nothing.
        Raises: InvalidRequest when the docks differ in columns, consumers or group size, this one is not empty, or
        `moved` doesn't fit.
        """
        if request_id and request_id == self.book.last_request[0]:
            return set()
        checks.check_restore(self.book, state, moved)
        sizes = {(node, offset): size for node, offset, size in state["extents"]}
        with self.spaces.taken([(node, offset, sizes[old, place]) for old, place, node, offset in moved]):
            return self._do("restore", dict(state), [list(row) for row in moved], request_id)

    def status(self) -> dict[str, Any]:
        """Counts over the samples that the dock holds; plain numbers, no sample is visited."""
        book = self.book
        return {
            "samples": len(book.samples),
            "columns": dict(book.column_counts),
            "groups_complete": dict(book.groups_complete),
            "consumers": {
                consumer: {
                    "ready": pool.size,
                    "leased": book.leased_counts[consumer],
                    "acked": book.acked_counts[consumer],
                    "dropped": book.dropped_counts[consumer],
                }
                for consumer, pool in book.pools.items()
            },
            "groups_open": len(book.open_groups),
            "ages": dict(sorted(book.ages.items())),
            "bytes_held": book.memory.bytes_held,
            "bytes_reserved": book.bytes_reserved,
            "capacity_bytes": self.settings.capacity_bytes,
            "capacity_groups": self.settings.capacity_groups,
            "nodes": self.spaces.status(book.memory),
        }


def _plain(holder: Sequence[Any] | None) -> list[Any] | None:
    return None if holder is None else list(holder)
