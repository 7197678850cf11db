"""Random lives of a ledger against a model that keeps everything in plain dictionaries and looks at all of it.

Everything that the ledger records is applied to a second book, which is always equal to the first; now and then the
ledger dies and goes on from its records.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.transfer_dock.ledger_model import (
    CAPACITY,
    COLUMNS,
    CONSUMERS,
    GROUP_SIZE,
    GROUPS,
    KEYS,
    LEASE_TIMEOUT,
    PUT_COLUMNS,
    Model,
    ModelPut,
    ModelReservation,
    counts,
    values,
)
from transfer_dock import spaces, wire
from transfer_dock.book import Book
from transfer_dock.columns import encode, lay_out
from transfer_dock.errors import InvalidRequest, LeaseLost
from transfer_dock.keys import SampleKey
from transfer_dock.ledger import Ledger
from transfer_dock.records import LeaseRequest, Settings

STEPS = st.sampled_from([1, 2])
NODES = st.sampled_from(["a", "b"])
HOLDERS = st.sampled_from([None, ("a", 1, 1.5), ("b", 2, 2.5)])
REQUESTS = st.sampled_from([b"", b"", b"", b"once"])


class LedgerMachine(Model, RuleBasedStateMachine):
    @initialize(groups=st.sampled_from([None, 3]), arena=st.sampled_from([640, 4096]))
    def start(self, groups: int | None, arena: int) -> None:
        self.arena = patch.multiple(spaces, PAGE=64, SMALLEST_ARENA=arena)
        self.arena.start()
        self.begin(arena, groups)
        self.settings = Settings(COLUMNS, CONSUMERS, GROUP_SIZE, CAPACITY, LEASE_TIMEOUT, groups)
        self.records: list[tuple[str, list]] = []
        self.ledger = Ledger(self.settings, self.write)
        self.shadow, self.shadowed, self.saved = Book(self.settings), 0, (None, 0)

    def write(self, kind: str, args: list) -> None:
        self.records.append(tuple(wire.unpack(wire.pack([kind, args]))))

    # ---- putting -----------------------------------------------------------------------------------------------
    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True),
        columns=st.sampled_from(PUT_COLUMNS),
        variant=st.sampled_from([1] * 7 + [2]),
        at_once=st.booleans(),
        who=st.tuples(NODES, HOLDERS, REQUESTS),
    )
    def reserve_some(self, keys: list[SampleKey], columns: list[str], variant: int, at_once: bool, who: tuple) -> None:
        self.reserve(keys, columns, variant, at_once, *who)

    def reserve(
        self, keys: list, columns: list, variant: int, at_once: bool, node: str = "a", holder: Any = None, request=b""
    ) -> None:
        names = {name: encode(name, COLUMNS[name], values(name, keys, variant), len(keys)) for name in columns}
        writes = {name: encoded.with_digests() for name, encoded in names.items()}
        enters = {key[:2] for key in keys if key not in self.cells}
        if refusal := self.refusal(keys, columns, variant):
            with pytest.raises(refusal):
                self.ledger.check_put(keys, writes)
            return
        new = self.ledger.new_columns(keys, writes)
        assert set(new) == {name for name in columns if any(name not in self.cells.get(key, {}) for key in keys)}
        nbytes, (_, size) = sum(writes[name].nbytes for name in new), lay_out(writes, new)
        never = nbytes > CAPACITY or size > self.size or (self.capacity_groups and len(enters) > self.capacity_groups)
        if never or not new:
            with pytest.raises(InvalidRequest) if never else patch.object(self, "write", None):
                self.ledger.check_put(keys, writes)
            return
        got = self.ledger.reserve(keys, writes, new, node, holder, self.now, request)
        same = [(ticket, one) for ticket, one in self.reservations.items() if request and one.request == request]
        for _, one in same:
            one.deadline = self.now + LEASE_TIMEOUT
        if same and same[0][1].place is not None:
            ticket, one = same[0]
            assert got == (ticket, one.new, *one.place)
            return
        if same:
            self.moved(same[0][0], got)
            return
        opening = enters - self.open_groups()
        lacks = self.bytes_held() + self.bytes_reserved() + nbytes > CAPACITY or (
            self.capacity_groups and opening and len(opening | self.open_groups()) > self.capacity_groups
        )
        offset = self.first_fit(node, size)
        if lacks or offset is None:
            assert got is None
            return
        assert got is not None
        assert got[1:] == (new, node, offset, size)
        self.fresh(got.ticket)
        ends, place = self.now + LEASE_TIMEOUT, (node, offset, size)
        self.reservations[got.ticket] = ModelReservation(
            ends, keys, new, writes, variant, nbytes, node, place, enters, holder, request
        )
        if at_once:
            self.commit(got.ticket)

    @rule(keys=st.sampled_from(GROUPS), columns=st.sampled_from(PUT_COLUMNS))
    def put_a_group(self, keys: list[SampleKey], columns: list[str]) -> None:
        self.reserve(keys, columns, variant=1, at_once=True)

    @rule(groups=st.lists(st.sampled_from(GROUPS), min_size=2, max_size=4, unique_by=lambda group: group[0]))
    def put_groups_that_are_ready(self, groups: list[list[SampleKey]]) -> None:
        self.reserve([key for group in groups for key in group], ["tokens", "rewards"], variant=1, at_once=True)

    @rule(key=st.sampled_from(KEYS), column=st.sampled_from(list(COLUMNS)))
    def put_a_cell(self, key: SampleKey, column: str) -> None:
        self.reserve([key], [column], variant=1, at_once=True)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data(), cancel=st.booleans())
    def end_reservation(self, data: st.DataObject, cancel: bool) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.reservations)))
        if cancel:
            self.ledger.cancel(ticket)
            del self.reservations[ticket]
        else:
            self.commit(ticket)

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.reservations)))
        self.moved(ticket, self.ledger.move(ticket, self.now))

    def commit(self, ticket: int) -> None:
        one = self.reservations[ticket]
        before = {consumer: self.available(consumer) for consumer in CONSUMERS}
        refusal = self.refusal(one.keys, list(one.writes), one.variant)
        if refusal or one.place is None:
            with pytest.raises(refusal or InvalidRequest):
                self.ledger.commit(ticket, one.keys, one.writes)
            return
        woken = self.ledger.commit(ticket, one.keys, one.writes)
        del self.reservations[ticket]
        for name in one.new:
            # A concurrent equal put may have come first: only what is still missing is taken from this one.
            fresh = {key for key in one.keys if name not in self.cells.get(key, {})}
            for key in one.keys:
                self.cells.setdefault(key, {})[name] = one.variant
                self.seen.setdefault(key[:2], set()).add(key.index)
                self.ages.setdefault(key[:2], 0)
            self.puts.append(ModelPut(one.writes[name].nbytes, fresh, one.place))
        assert woken == {consumer for consumer in CONSUMERS if self.available(consumer) != before[consumer]}
        self.forget_finished_puts()

    # ---- taking ------------------------------------------------------------------------------------------------
    @rule(
        consumer=st.sampled_from(list(CONSUMERS)),
        pieces=st.integers(1, 3),
        fewer=st.integers(0, 2),
        whole=st.booleans(),
        step=st.none() | STEPS,
        who=st.tuples(HOLDERS, REQUESTS),
    )
    def lease(self, consumer: str, pieces: int, fewer: int, whole: bool, step: int | None, who: tuple) -> None:
        size = GROUP_SIZE if whole else 1
        self.take(LeaseRequest(consumer, pieces * size, max(pieces - fewer, 1) * size, whole, step), *who)

    @rule(
        consumer=st.sampled_from(list(CONSUMERS)),
        whole=st.booleans(),
        most=st.sampled_from([0, 0, 1]),
        stale=st.sampled_from(["drop", "drop", "wait"]),
        step=st.sampled_from([None, None, 1]),
    )
    def lease_what_is_fresh(self, consumer: str, whole: bool, most: int, stale: str, step: int | None) -> None:
        self.take(LeaseRequest(consumer, 2, 2 if whole else 1, whole, step, most, stale))

    @rule(
        consumer=st.sampled_from(list(CONSUMERS)),
        count=st.sampled_from([1, 2, 2]),
        ranks=st.sampled_from([(None, None), (None, None), (0, 1), (0, 2), (1, 2)]),
        whole=st.booleans(),
        most=st.sampled_from([None, None, 0]),
        stale=st.sampled_from(["drop", "wait"]),
        who=st.tuples(HOLDERS, REQUESTS),
    )
    def lease_a_balanced_part(
        self, consumer: str, count: int, ranks: tuple, whole: bool, most: int | None, stale: str, who: tuple
    ) -> None:
        count *= GROUP_SIZE if whole else 1
        self.take(LeaseRequest(consumer, count, count, whole, None, most, stale, True, *ranks), *who)

    def held_rows(self, data: st.DataObject) -> tuple[int, list[SampleKey]]:
        ticket = data.draw(st.sampled_from(sorted(self.leases)))
        return ticket, data.draw(st.lists(st.sampled_from(self.leases[ticket].keys), min_size=1, unique=True))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        self.acknowledge(*self.held_rows(data))

    @rule()
    def finish_what_is_ready(self) -> None:
        for consumer in CONSUMERS:
            if got := self.take(LeaseRequest(consumer, 4, 1)):
                self.acknowledge(*got)

    def acknowledge(self, ticket: int, keys: list[SampleKey]) -> None:
        lease = self.leases[ticket]
        assert self.ledger.holds(ticket, keys)
        self.ledger.ack(lease.consumer, ticket, keys)
        lease.partly |= set(keys)
        lease.tag = None
        done = [key for key in lease.keys if set(lease.piece(key)) <= lease.partly]
        for key in done:
            assert (lease.consumer, key) not in self.acked, "acknowledged twice"
            self.acked[lease.consumer, key] = ticket
        if done:
            self.end(ticket, done)
            assert not self.ledger.holds(ticket, keys)
        self.forget_finished_puts()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket, keys = self.held_rows(data)
        lease = self.leases[ticket]
        lease.tag = None
        assert self.ledger.release(ticket, keys) == {lease.consumer}
        self.end(ticket, sorted({member for key in keys for member in lease.piece(key)}))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def late_or_repeated_ack(self, data: st.DataObject) -> None:
        ticket, lease = data.draw(st.sampled_from(self.ended))
        recorded = len(self.records)
        if all(key in self.cells and self.acked.get((lease.consumer, key)) == ticket for key in lease.keys):
            self.ledger.ack(lease.consumer, ticket, lease.keys)
        else:
            with pytest.raises(LeaseLost):
                self.ledger.ack(lease.consumer, ticket, lease.keys)
        assert self.ledger.release(ticket, lease.keys) == set()
        assert len(self.records) == recorded

    # ---- processes, time and steps -----------------------------------------------------------------------------
    @rule(holder=HOLDERS)
    def end_holder(self, holder: Any) -> None:
        everyone = {**self.leases, **self.reservations}
        assert set(self.ledger.holders()) == {one.holder for one in everyone.values()} - {None}
        if holder is not None:
            tickets = [ticket for ticket, one in everyone.items() if one.holder == holder]
            assert self.ledger.end_holder(holder, self.now) == self.give_back(tickets)

    @rule()
    def withdraw(self) -> None:
        tickets = [ticket for ticket, one in {**self.leases, **self.reservations}.items() if one.request == b"once"]
        assert self.ledger.withdraw(b"once") == self.give_back(tickets)

    @rule(seconds=st.sampled_from([0.2, 0.3]) | st.floats(0.5, 7.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        late = [
            (ticket, one) for ticket, one in {**self.leases, **self.reservations}.items() if one.deadline <= self.now
        ]
        assert self.ledger.expire(self.now) == self.give_back([ticket for ticket, _ in late])
        for ticket, one in late:
            if isinstance(one, ModelReservation):
                self.late_commit(ticket, one)

    @rule(step=STEPS, carry=st.sampled_from([True] * 7 + [False]))
    def close_step(self, step: int, carry: bool) -> None:
        dropped = [key for key in self.cells if key.step == step and not (carry and self.unfinished(key))]
        assert self.ledger.close_step(step, carry) == len(dropped)
        for ticket, lease in list(self.leases.items()):
            if lost := [key for key in lease.keys if key in dropped]:
                self.end(ticket, lease.keys if lease.tag else lost)
        for key in dropped:
            del self.cells[key]
            for consumer in CONSUMERS:
                self.acked.pop((consumer, key), None)
        self.gone |= set(dropped)
        held = {key[:2] for key in self.cells}
        self.ages = {group: age + (carry and group[0] <= step) for group, age in self.ages.items() if group in held}
        for ticket, lease in list(self.leases.items()):
            most = lease.tag and lease.tag.max_staleness
            if most is not None and any(self.ages[key[:2]] > most for key in lease.keys):
                self.end(ticket, lease.keys)
        if not carry:
            self.closed.add(step)
        self.forget_finished_puts()

    # ---- checkpoints and crashes -------------------------------------------------------------------------------
    @rule()
    def pin(self) -> None:
        self.pins[self.ledger.pin()] = self.live()

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.pins)))
        self.ledger.unpin(number)
        del self.pins[number]

    @rule()
    def save(self) -> None:
        self.saved = wire.unpack(wire.pack(self.ledger.book.state())), len(self.records)

    @rule(from_the_start=st.booleans())
    def crash(self, from_the_start: bool) -> None:
        """The controller is killed and goes on from what was written."""
        state, first = (None, 0) if from_the_start else self.saved
        before = self.ledger.status()
        self.now += 100.0
        self.ledger = Ledger.replay(self.settings, state, self.records[first:], self.now, self.write)
        self.parked, self.pins = {}, {}
        for one in [*self.leases.values(), *self.reservations.values()]:
            one.deadline = self.now + LEASE_TIMEOUT
        after = self.ledger.status()
        assert {**after, "nodes": 0} == {**before, "nodes": 0}

    # ---- what always holds -------------------------------------------------------------------------------------
    @invariant()
    def counts_agree(self) -> None:
        assert self.ledger.expire(self.now) == set()
        status = self.ledger.status()
        expected = self.status()
        assert {name: status[name] for name in expected} == expected
        assert status["bytes_held"] <= CAPACITY
        assert status["groups_open"] <= (self.capacity_groups or len(GROUPS))
        assert set(self.ledger.book.leases) == set(self.leases)
        ends = [one.deadline for one in [*self.leases.values(), *self.reservations.values()]]
        ends += [end for end in self.parked.values() if end > self.now]
        assert self.ledger.next_deadline() == min(ends, default=None)

    @invariant()
    def memory_agrees(self) -> None:
        held = self.ledger.book.memory.extents.values()
        assert {(extent.node, extent.offset, extent.size) for extent in held} == self.live()
        nodes = self.ledger.status()["nodes"]
        for node in ("a", "b"):
            places = self.occupied(node)
            assert all(end <= start for (_, end), (start, _) in pairwise(places)), "overlap"
            used = sum(end - first for first, end in places)
            assert nodes.get(node, {"used": 0})["used"] == used
            assert nodes.get(node, {"highest": 0})["highest"] >= max((end for _, end in places), default=0)

    @invariant()
    def records_make_the_same_book(self) -> None:
        for kind, args in self.records[self.shadowed :]:
            self.shadow.apply(kind, args)
        self.shadowed = len(self.records)
        state = wire.pack(self.ledger.book.state())
        assert wire.pack(self.shadow.state()) == state
        if self.shadowed % 4 == 0:
            # From here on the loaded one has to keep up.
            self.shadow = Book.load(self.settings, wire.unpack(state))
            assert wire.pack(self.shadow.state()) == state
            assert counts(self.shadow) == counts(self.ledger.book)

    def teardown(self) -> None:
        """Whatever happened, every sample that is complete now still reaches each consumer exactly once."""
        if not hasattr(self, "ledger"):
            return
        self.pass_time(LEASE_TIMEOUT)
        for consumer in CONSUMERS:
            left = self.available(consumer)
            while got := self.take(LeaseRequest(consumer, 3, 1)):
                assert got[1] == left[: len(got[1])]
                left = left[len(got[1]) :]
                self.acknowledge(*got)
            assert not left, "lost"
        scratch = Book(self.settings)
        for kind, args in self.records:
            scratch.apply(kind, args)
        assert wire.pack(scratch.state()) == wire.pack(self.ledger.book.state())
        self.arena.stop()


LedgerMachine.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedger = LedgerMachine.TestCase
