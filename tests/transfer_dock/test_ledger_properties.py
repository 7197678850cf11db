"""Random lives of a ledger against a model that keeps everything in plain dictionaries and looks at all of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transfer_dock.columns import encode
from transfer_dock.errors import ConflictingPut, DockTimeout, InvalidRequest, LeaseLost, StepClosed
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey
from transfer_dock.ledger import Ledger

COLUMNS = {"tokens": "int32", "rewards": "float32", "notes": "str"}
PUT_COLUMNS = [["tokens"], ["rewards"], ["notes"], ["tokens", "rewards"], ["rewards", "tokens", "notes"]]
CONSUMERS = {"score": ["tokens"], "train": ["tokens", "rewards"]}
GROUP_SIZE = 2
CAPACITY = 250
LEASE_TIMEOUT = 10.0
# Index 7 makes a third sample of a group of two.
KEYS = [SampleKey(*key) for key in product((1, 2), (0, 1, 2), (0, 5))] + [SampleKey(1, 0, 7)]
GROUPS = [KEYS[first : first + GROUP_SIZE] for first in range(0, 12, GROUP_SIZE)]
STEPS = st.sampled_from([1, 2])


@dataclass
class ModelLease:
    consumer: str
    deadline: float
    whole: bool
    keys: list[SampleKey]
    partly: set[SampleKey] = field(default_factory=set)

    def piece(self, key: SampleKey) -> list[SampleKey]:
        return [other for other in self.keys if other[:2] == key[:2]] if self.whole else [key]


@dataclass
class ModelPut:
    """One column of one put: the bytes stay until no unfinished sample of `keys` is left."""

    nbytes: int
    keys: set[SampleKey]


def values(column: str, keys: list[SampleKey], variant: int) -> object:
    if column == "tokens":
        return Jagged.from_rows([np.full(1 + key.index % 4, variant, np.int32) for key in keys])
    if column == "rewards":
        return np.full(len(keys), variant, np.float32)
    return [f"note {variant}"] * len(keys)


class LedgerMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.ledger = Ledger(COLUMNS, CONSUMERS, GROUP_SIZE, CAPACITY, LEASE_TIMEOUT)
        self.now = 0.0
        self.cells: dict[SampleKey, dict[str, int]] = {}
        self.acked: dict[tuple[str, SampleKey], int] = {}
        self.leases: dict[int, ModelLease] = {}
        self.reservations: dict[int, tuple[float, list, int, int]] = {}
        self.puts: list[ModelPut] = []
        self.seen: dict[tuple[int, int], set[int]] = {}
        self.gone: set[SampleKey] = set()
        self.closed: set[int] = set()
        self.ended: list[tuple[int, ModelLease]] = []

    # ---- the model's view --------------------------------------------------------------------------------------
    def available(self, consumer: str, step: int | None = None) -> list[SampleKey]:
        busy = {key for lease in self.leases.values() if lease.consumer == consumer for key in lease.keys}
        return sorted(
            key
            for key, cells in self.cells.items()
            if all(column in cells for column in CONSUMERS[consumer])
            and key not in busy
            and (consumer, key) not in self.acked
            and step in (None, key.step)
        )

    def whole(self, keys: list[SampleKey]) -> list[SampleKey]:
        return [key for key in keys if sum(other[:2] == key[:2] for other in keys) == GROUP_SIZE]

    def unfinished(self, key: SampleKey) -> bool:
        return key in self.cells and any((consumer, key) not in self.acked for consumer in CONSUMERS)

    def bytes_held(self) -> int:
        return sum(put.nbytes for put in self.puts if any(map(self.unfinished, put.keys)))

    def bytes_reserved(self) -> int:
        return sum(nbytes for _, _, _, nbytes in self.reservations.values())

    def forget_finished_puts(self) -> None:
        for put in self.puts:
            put.keys = set(filter(self.unfinished, put.keys))

    # ---- putting -----------------------------------------------------------------------------------------------
    def refusal(self, keys: list[SampleKey], columns: list[str], variant: int) -> type[Exception] | None:
        if any(key in self.gone or key.step in self.closed for key in keys):
            return StepClosed
        for group in {key[:2] for key in keys}:
            if len(self.seen.get(group, set()) | {key.index for key in keys if key[:2] == group}) > GROUP_SIZE:
                return InvalidRequest
        if any(self.cells.get(key, {}).get(column, variant) != variant for key in keys for column in columns):
            return ConflictingPut
        return None

    def writes(self, keys: list[SampleKey], columns: list[str], variant: int) -> dict:
        return {name: encode(name, COLUMNS[name], values(name, keys, variant), len(keys))[0] for name in columns}

    @rule(
        keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True),
        columns=st.sampled_from(PUT_COLUMNS),
        variant=st.sampled_from([1] * 7 + [2]),
        at_once=st.booleans(),
    )
    def reserve_some(self, keys: list[SampleKey], columns: list[str], variant: int, at_once: bool) -> None:
        self.reserve(keys, columns, variant, at_once)

    def reserve(self, keys: list[SampleKey], columns: list[str], variant: int, at_once: bool) -> None:
        writes = self.writes(keys, columns, variant)
        if refusal := self.refusal(keys, columns, variant):
            with pytest.raises(refusal):
                self.ledger.new_columns(keys, writes)
            return
        new = self.ledger.new_columns(keys, writes)
        assert set(new) == {name for name in columns if any(name not in self.cells.get(key, {}) for key in keys)}
        nbytes = sum(writes[name].nbytes for name in new)
        ticket = self.ledger.reserve(nbytes, self.now)
        if ticket is None:
            assert self.bytes_held() + self.bytes_reserved() + nbytes > CAPACITY
            return
        assert self.bytes_held() + self.bytes_reserved() + nbytes <= CAPACITY
        self.reservations[ticket] = (self.now + LEASE_TIMEOUT, [keys, new, writes], variant, nbytes)
        if at_once:
            self.commit(ticket)

    @rule(keys=st.sampled_from(GROUPS), columns=st.sampled_from(PUT_COLUMNS))
    def put_a_group(self, keys: list[SampleKey], columns: list[str]) -> None:
        self.reserve(keys, columns, variant=1, at_once=True)

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

    def commit(self, ticket: int) -> None:
        _, (keys, new, writes), variant, _ = self.reservations[ticket]
        before = {consumer: self.available(consumer) for consumer in CONSUMERS}
        refs = dict.fromkeys(new, object())
        if refusal := self.refusal(keys, list(writes), variant):
            with pytest.raises(refusal):
                self.ledger.commit(ticket, keys, writes, refs)
            return
        woken = self.ledger.commit(ticket, keys, writes, refs)
        del self.reservations[ticket]
        for name in new:
            # A concurrent equal put may have come first: only what is still missing is taken from this one.
            fresh = {key for key in keys if name not in self.cells.get(key, {})}
            for key in keys:
                self.cells.setdefault(key, {})[name] = variant
                self.seen.setdefault(key[:2], set()).add(key.index)
            self.puts.append(ModelPut(writes[name].nbytes, fresh))
        assert woken == {consumer for consumer in CONSUMERS if self.available(consumer) != before[consumer]}
        self.forget_finished_puts()

    # ---- taking ------------------------------------------------------------------------------------------------
    @rule(
        consumer=st.sampled_from(list(CONSUMERS)),
        pieces=st.integers(1, 3),
        fewer=st.integers(0, 2),
        whole=st.booleans(),
        step=st.none() | STEPS,
    )
    def lease(self, consumer: str, pieces: int, fewer: int, whole: bool, step: int | None) -> None:
        size = GROUP_SIZE if whole else 1
        count, minimum = pieces * size, max(pieces - fewer, 1) * size
        if step in self.closed:
            with pytest.raises(StepClosed):
                self.ledger.lease(consumer, count, minimum, whole, step, self.now)
            return
        expected = self.available(consumer, step)
        expected = (self.whole(expected) if whole else expected)[:count]
        grant = self.ledger.lease(consumer, count, minimum, whole, step, self.now)
        if len(expected) < minimum:
            assert grant is None
            return
        assert grant is not None
        ticket, keys = grant
        assert keys == expected
        assert ticket not in self.leases
        self.leases[ticket] = ModelLease(consumer, self.now + LEASE_TIMEOUT, whole, list(keys))
        for read in self.ledger.read(keys, CONSUMERS[consumer]).values():
            assert len(read.block) == len(keys)

    def end(self, ticket: int, keys: list[SampleKey]) -> None:
        lease = self.leases[ticket]
        lease.keys = [key for key in lease.keys if key not in keys]
        self.ended.append((ticket, ModelLease(lease.consumer, 0.0, lease.whole, list(keys))))
        if not lease.keys:
            del self.leases[ticket]

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
            grant = self.ledger.lease(consumer, 4, 1, False, None, self.now)
            assert (grant is None) == (not self.available(consumer))
            if grant is not None:
                self.leases[grant[0]] = ModelLease(consumer, self.now + LEASE_TIMEOUT, False, list(grant[1]))
                self.acknowledge(*grant)

    def acknowledge(self, ticket: int, keys: list[SampleKey]) -> None:
        lease = self.leases[ticket]
        self.ledger.ack(lease.consumer, ticket, keys)
        lease.partly |= set(keys)
        done = [key for key in lease.keys if set(lease.piece(key)) <= lease.partly]
        for key in done:
            assert (lease.consumer, key) not in self.acked, "acknowledged twice"
            self.acked[lease.consumer, key] = ticket
        if done:
            self.end(ticket, done)
        self.forget_finished_puts()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket, keys = self.held_rows(data)
        lease = self.leases[ticket]
        assert self.ledger.release(ticket, keys) == {lease.consumer}
        self.end(ticket, sorted({member for key in keys for member in lease.piece(key)}))

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def late_or_repeated_ack(self, data: st.DataObject) -> None:
        ticket, lease = data.draw(st.sampled_from(self.ended))
        if all(key in self.cells and self.acked.get((lease.consumer, key)) == ticket for key in lease.keys):
            self.ledger.ack(lease.consumer, ticket, lease.keys)
        else:
            with pytest.raises(LeaseLost):
                self.ledger.ack(lease.consumer, ticket, lease.keys)
        assert self.ledger.release(ticket, lease.keys) == set()

    # ---- time and steps ----------------------------------------------------------------------------------------
    @rule(seconds=st.floats(0.5, 7.0))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        expired = [ticket for ticket, lease in self.leases.items() if lease.deadline <= self.now]
        late = [ticket for ticket, reservation in self.reservations.items() if reservation[0] <= self.now]
        assert self.ledger.expire(self.now) == {self.leases[ticket].consumer for ticket in expired}
        for ticket in expired:
            self.end(ticket, list(self.leases[ticket].keys))
        for ticket in late:
            _, (keys, new, writes), _, _ = self.reservations.pop(ticket)
            with pytest.raises(DockTimeout):
                self.ledger.commit(ticket, keys, writes, dict.fromkeys(new, object()))

    @rule(step=STEPS, carry=st.sampled_from([True] * 7 + [False]))
    def close_step(self, step: int, carry: bool) -> None:
        dropped = [key for key in self.cells if key.step == step and not (carry and self.unfinished(key))]
        assert self.ledger.close_step(step, carry) == len(dropped)
        for ticket in list(self.leases):
            if lost := [key for key in self.leases[ticket].keys if key in dropped]:
                self.end(ticket, lost)
        for key in dropped:
            del self.cells[key]
            for consumer in CONSUMERS:
                self.acked.pop((consumer, key), None)
        self.gone |= set(dropped)
        if not carry:
            self.closed.add(step)
        self.forget_finished_puts()

    # ---- what always holds -------------------------------------------------------------------------------------
    @invariant()
    def counts_agree(self) -> None:
        status = self.ledger.status()
        assert status["samples"] == len(self.cells)
        assert status["bytes_held"] == self.bytes_held() <= CAPACITY
        assert status["bytes_reserved"] == self.bytes_reserved()
        for column in COLUMNS:
            having = [key for key, cells in self.cells.items() if column in cells]
            assert status["columns"][column] == len(having)
            assert status["groups_complete"][column] == len(self.whole(having)) // GROUP_SIZE
        for consumer in CONSUMERS:
            leased = [key for lease in self.leases.values() if lease.consumer == consumer for key in lease.keys]
            assert len(set(leased)) == len(leased), "one sample under two leases"
            assert status["consumers"][consumer] == {
                "ready": len(self.available(consumer)),
                "leased": len(leased),
                "acked": sum(name == consumer for name, _ in self.acked),
            }

    def teardown(self) -> None:
        """Whatever happened, every sample that is complete now still reaches each consumer exactly once."""
        if not hasattr(self, "ledger"):
            return
        self.pass_time(LEASE_TIMEOUT)
        for consumer in CONSUMERS:
            left = self.available(consumer)
            while grant := self.ledger.lease(consumer, 3, 1, False, None, self.now):
                ticket, keys = grant
                assert keys == left[: len(keys)]
                left = left[len(keys) :]
                self.ledger.ack(consumer, ticket, keys)
            assert not left, "lost"


LedgerMachine.TestCase.settings = settings(
    max_examples=250,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLedger = LedgerMachine.TestCase
