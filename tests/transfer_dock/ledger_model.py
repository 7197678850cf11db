"""A dock in plain dictionaries, for comparison: it looks at all of it every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest

from transfer_dock import spaces
from transfer_dock.book import Book
from transfer_dock.columns import lay_out
from transfer_dock.errors import ConflictingPut, DockTimeout, InvalidRequest, StepClosed
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey
from transfer_dock.ledger import Ledger
from transfer_dock.records import LeaseRequest

COLUMNS = {"tokens": "int32", "rewards": "float32", "notes": "str"}
PUT_COLUMNS = [["tokens"], ["rewards"], ["notes"], ["tokens", "rewards"], ["rewards", "tokens", "notes"]]
CONSUMERS = {"score": ("tokens",), "train": ("tokens", "rewards")}
GROUP_SIZE = 2
CAPACITY = 250
LEASE_TIMEOUT = 10.0
# Index 7 makes a third sample of a group of two.
KEYS = [SampleKey(*key) for key in product((1, 2), (0, 1, 2), (0, 5))] + [SampleKey(1, 0, 7)]
GROUPS = [KEYS[first : first + GROUP_SIZE] for first in range(0, 12, GROUP_SIZE)]


@dataclass
class ModelLease:
    consumer: str
    deadline: float
    whole: bool
    keys: list[SampleKey]
    holder: Any = None
    request: bytes = b""
    tag: Any = None
    partly: set[SampleKey] = field(default_factory=set)

    def piece(self, key: SampleKey) -> list[SampleKey]:
        return [other for other in self.keys if other[:2] == key[:2]] if self.whole else [key]


@dataclass
class ModelReservation:
    """A put being written; `place` is (node, offset, size) or None."""

    deadline: float
    keys: list[SampleKey]
    new: list[str]
    writes: dict
    variant: int
    nbytes: int
    node: str
    place: tuple[str, int, int] | None
    enters: set
    holder: Any
    request: bytes


@dataclass
class ModelPut:
    """One column of one put: the bytes stay until no unfinished sample of `keys` is left."""

    nbytes: int
    keys: set[SampleKey]
    place: tuple[str, int, int]


def values(column: str, keys: list[SampleKey], variant: int) -> object:
    if column == "tokens":
        return Jagged.from_rows([np.full(1 + key.index % 4, variant, np.int32) for key in keys])
    if column == "rewards":
        return np.full(len(keys), variant, np.float32)
    return [f"note {variant}"] * len(keys)


class Model:
    """What was put, taken and acknowledged, and which memory that takes; `size` bytes a node."""

    ledger: Ledger

    def begin(self, size: int, capacity_groups: int | None) -> None:
        self.size, self.capacity_groups, self.now = size, capacity_groups, 0.0
        self.cells: dict[SampleKey, dict[str, int]] = {}
        self.acked: dict[tuple[str, SampleKey], int] = {}
        self.leases: dict[int, ModelLease] = {}
        self.reservations: dict[int, ModelReservation] = {}
        self.puts: list[ModelPut] = []
        self.seen: dict[tuple[int, int], set[int]] = {}
        self.ages: dict[tuple[int, int], int] = {}
        self.gone: set[SampleKey] = set()
        self.closed: set[int] = set()
        self.ended: list[tuple[int, ModelLease]] = []
        self.parked: dict[tuple[str, int, int], float] = {}
        self.pins: dict[int, set] = {}
        self.tickets: set[int] = set()

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
        return sum(reservation.nbytes for reservation in self.reservations.values())

    def open_groups(self) -> set:
        entered = {group for reservation in self.reservations.values() for group in reservation.enters}
        return {key[:2] for key in self.cells if self.unfinished(key)} | entered

    def live(self) -> set:
        places = [put.place for put in self.puts if any(map(self.unfinished, put.keys))]
        return {*places, *[one.place for one in self.reservations.values() if one.place]}

    def occupied(self, node: str) -> list[tuple[int, int]]:
        places = self.live().union({place for place, end in self.parked.items() if end > self.now}, *self.pins.values())
        return sorted((offset, offset + size) for where, offset, size in places if where == node)

    def first_fit(self, node: str, size: int) -> int | None:
        offset = 0
        for first, end in self.occupied(node):
            if offset + size <= first:
                break
            offset = max(offset, end)
        return offset if offset + size <= self.size else None

    def forget_finished_puts(self) -> None:
        for put in self.puts:
            put.keys = set(filter(self.unfinished, put.keys))

    def refusal(self, keys: list[SampleKey], columns: list[str], variant: int) -> type[Exception] | None:
        if any(key in self.gone or key.step in self.closed for key in keys):
            return StepClosed
        for group in {key[:2] for key in keys}:
            if len(self.seen.get(group, set()) | {key.index for key in keys if key[:2] == group}) > GROUP_SIZE:
                return InvalidRequest
        if any(self.cells.get(key, {}).get(column, variant) != variant for key in keys for column in columns):
            return ConflictingPut
        return None

    def fresh(self, ticket: int) -> None:
        assert ticket > max(self.tickets, default=0)
        self.tickets.add(ticket)

    def is_fresh(self, asked: LeaseRequest, key: SampleKey) -> bool:
        return asked.max_staleness is None or self.ages[key[:2]] <= asked.max_staleness

    def choose(self, asked: LeaseRequest) -> list[SampleKey]:
        keys = [key for key in self.available(asked.consumer, asked.step) if self.is_fresh(asked, key)]
        return self.whole(keys) if asked.whole_groups else keys

    def end(self, ticket: int, keys: list[SampleKey]) -> None:
        lease = self.leases[ticket]
        lease.keys = [key for key in lease.keys if key not in keys]
        self.ended.append((ticket, ModelLease(lease.consumer, 0.0, lease.whole, list(keys))))
        if not lease.keys:
            del self.leases[ticket]

    def drop(self, asked: LeaseRequest) -> None:
        if asked.stale != "drop":
            return
        away = {key[:2] for one in self.leases.values() if one.consumer == asked.consumer for key in one.keys}
        for key in self.available(asked.consumer, asked.step):
            if not self.is_fresh(asked, key) and not (asked.whole_groups and key[:2] in away):
                self.acked[asked.consumer, key] = 0
        self.forget_finished_puts()

    def direct(self, asked: LeaseRequest, grant: Any) -> int | None:
        keys = self.choose(asked)[: asked.count]
        if len(keys) < asked.minimum:
            return None
        self.fresh(grant.ticket)
        self.leases[grant.ticket] = ModelLease(asked.consumer, 0.0, asked.whole_groups, keys)
        return grant.ticket

    def part(self, asked: LeaseRequest, grant: Any) -> int | None:
        """The oldest unclaimed part of an earlier plan, or else the asked one of a new plan."""
        tag = asked.tag()
        keys = self.choose(asked)
        parts = asked.ranks or len(keys) // asked.count
        if tag not in [lease.tag for lease in self.leases.values()]:
            if not parts or len(keys) < parts * asked.count:
                return None
            made = {
                ticket: list(one.held)
                for ticket, one in self.ledger.book.leases.items()
                if ticket > max(self.tickets, default=0)
            }
            assert len(made) == parts
            assert sorted(key for part in made.values() for key in part) == keys[: parts * asked.count]
            for rank, (ticket, part) in enumerate(sorted(made.items())):
                assert len(part) == asked.count
                assert part == sorted(part)
                assert not asked.whole_groups or self.whole(part) == part
                self.fresh(ticket)
                new = ModelLease(asked.consumer, self.now + LEASE_TIMEOUT, asked.whole_groups, part)
                new.tag = tag._replace(rank=None if asked.ranks is None else rank)
                self.leases[ticket] = new
        return min(ticket for ticket, lease in self.leases.items() if lease.tag == tag)

    def give_back(self, tickets: list[int]) -> set[str]:
        woken = {self.leases[ticket].consumer for ticket in tickets if ticket in self.leases}
        for ticket in tickets:
            if ticket in self.leases:
                self.end(ticket, list(self.leases[ticket].keys))
            else:
                del self.reservations[ticket]
        return woken

    def moved(self, ticket: int, got: Any) -> None:
        """The model still has the old place."""
        one = self.reservations[ticket]
        _, size = lay_out(one.writes, one.new)
        offset = self.first_fit(one.node, size)
        if one.place is not None:
            self.parked[one.place] = self.now + spaces.PARKED_SECONDS
        one.place = None if offset is None else (one.node, offset, size)
        assert got == (None if offset is None else (ticket, one.new, one.node, offset, size))

    def late_commit(self, ticket: int, one: ModelReservation) -> None:
        refused = self.refusal(one.keys, list(one.writes), one.variant)
        missing = any(name not in self.cells.get(key, {}) for key in one.keys for name in one.writes)
        if refused or missing:
            with pytest.raises(refused or DockTimeout):
                self.ledger.commit(ticket, one.keys, one.writes)
        else:
            assert self.ledger.commit(ticket, one.keys, one.writes) == set()
        with pytest.raises(DockTimeout):
            self.ledger.move(ticket, self.now)

    def take(self, asked: LeaseRequest, holder: Any = None, request: bytes = b"") -> tuple[int, list] | None:
        asked = LeaseRequest(**{**vars(asked), "request_id": request})
        if asked.step in self.closed:
            with pytest.raises(StepClosed):
                self.ledger.lease(asked, holder, self.now)
            return None
        grant = self.ledger.lease(asked, holder, self.now)
        for ticket, lease in self.leases.items():
            if request and (lease.consumer, lease.request) == (asked.consumer, request):
                assert grant is not None
                assert grant[:2] == (ticket, lease.keys)
                return None
        self.drop(asked)
        ticket = self.part(asked, grant) if asked.balance else self.direct(asked, grant)
        if ticket is None:
            assert grant is None
            return None
        lease = self.leases[ticket]
        lease.holder, lease.request, lease.tag, lease.deadline = holder, request, None, self.now + LEASE_TIMEOUT
        assert grant == (ticket, lease.keys, [self.ages[key[:2]] for key in lease.keys])
        for read in self.ledger.read(grant.keys, CONSUMERS[asked.consumer]).values():
            assert len(read.block) == len(grant.keys)
            assert {place[:3] for place in read.places} <= self.live()
        return ticket, grant.keys

    def status(self) -> dict[str, Any]:
        ages, consumers = list(self.ages.values()), {}
        having = {name: [key for key, cells in self.cells.items() if name in cells] for name in COLUMNS}
        for consumer in CONSUMERS:
            leased = [key for lease in self.leases.values() if lease.consumer == consumer for key in lease.keys]
            assert len(set(leased)) == len(leased), "one sample under two leases"
            marks = [mark for (name, _), mark in self.acked.items() if name == consumer]
            consumers[consumer] = {
                "ready": len(self.available(consumer)),
                "leased": len(leased),
                "acked": sum(mark > 0 for mark in marks),
                "dropped": marks.count(0),
            }
        return {
            "samples": len(self.cells),
            "bytes_held": self.bytes_held(),
            "bytes_reserved": self.bytes_reserved(),
            "groups_open": len(self.open_groups()),
            "ages": {age: ages.count(age) for age in ages},
            "columns": {name: len(keys) for name, keys in having.items()},
            "groups_complete": {name: len(self.whole(keys)) // GROUP_SIZE for name, keys in having.items()},
            "consumers": consumers,
        }


def counts(book: Book) -> dict[str, Any]:
    """What a book counts and looks up, apart from what it stores."""
    pools = {name: (pool.size, pool.members, pool.groups, pool.complete) for name, pool in book.pools.items()}
    derived = ("requests", "unclaimed", "held_by", "open_groups", "ages", "bytes_reserved", "column_counts")
    numbers = ("groups_complete", "leased_counts", "acked_counts", "dropped_counts")
    return {name: getattr(book, name) for name in derived + numbers} | {"pools": pools, "held": book.memory.bytes_held}
