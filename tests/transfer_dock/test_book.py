"""A ledger's records and states: what a restart keeps, what a failed record leaves, what a saved dock brings along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from transfer_dock import wire
from transfer_dock.book import Book
from transfer_dock.columns import ColumnWrite, encode
from transfer_dock.errors import DockError, InvalidRequest, LeaseLost, StepClosed
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey
from transfer_dock.ledger import Ledger
from transfer_dock.records import LeaseRequest, Settings

SETTINGS = Settings(
    {"tokens": "int32", "rewards": "float32"}, {"score": ["tokens"], "train": ["tokens", "rewards"]}, 2, 4096, 10.0
)
HOLDER = ["node", 1, 1.0]
Act = Callable[[Ledger], object]


def keys_of(groups: Sequence[int], step: int = 1) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in (0, 1)]


def writes_of(keys: Sequence[SampleKey], *columns: str) -> dict[str, ColumnWrite]:
    values = {
        "tokens": Jagged.from_rows([np.arange(1 + 3 * key.group + key.index, dtype=np.int32) for key in keys]),
        "rewards": np.ones(len(keys), np.float32),
    }
    columns = columns or tuple(values)
    return {name: encode(name, SETTINGS.dtypes[name], values[name], len(keys)).with_digests() for name in columns}


def put(ledger: Ledger, keys: Sequence[SampleKey], *columns: str, node: str = "node") -> None:
    writes = writes_of(keys, *columns)
    reservation = ledger.reserve(keys, writes, ledger.check_put(keys, writes), node, HOLDER, 0.0)
    assert reservation is not None
    ledger.commit(reservation.ticket, keys, writes)


def recorded(settings: Settings = SETTINGS) -> tuple[Ledger, list[tuple[str, Any]]]:
    records: list[tuple[str, Any]] = []
    return Ledger(settings, lambda kind, args: records.append(tuple(wire.unpack(wire.pack([kind, args]))))), records


def lived() -> tuple[Ledger, list[tuple[str, Any]]]:
    """A ledger with some of everything: finished, partly acknowledged, leased, planned, carried, being written."""
    ledger, records = recorded()
    put(ledger, keys_of(range(4)))
    put(ledger, keys_of([4, 5]), "tokens", node="other")
    put(ledger, keys_of([0, 1, 2], step=2))
    put(ledger, keys_of([0], step=0))
    for consumer in ("score", "train"):
        grant = ledger.lease(LeaseRequest(consumer, 4, 4), HOLDER, 0.0)
        ledger.ack(consumer, grant.ticket, grant.keys)
    grant = ledger.lease(LeaseRequest("train", 4, 4, whole_groups=True, request_id=b"a"), HOLDER, 0.0)
    ledger.ack("train", grant.ticket, grant.keys[:1])
    ledger.close_step(0, False)
    ledger.close_step(1, True)
    ledger.lease(LeaseRequest("score", 2, 2, balance=True, rank=1, ranks=2), None, 0.0)
    ledger.lease(LeaseRequest("train", 2, 2, max_staleness=0, stale="drop"), HOLDER, 0.0)
    writes = writes_of(keys_of([7], step=3))
    ledger.reserve(keys_of([7], step=3), writes, list(writes), "node", HOLDER, 0.0, b"r")
    return ledger, records


def state_of(ledger: Ledger) -> bytes:
    return wire.pack(ledger.book.state())


def test_every_prefix_of_the_records_is_a_ledger_that_goes_on() -> None:
    _, records = lived()
    assert {kind for kind, _ in records} == {"reserve", "commit", "lease", "claim", "ack", "close", "drop"}
    for cut in range(len(records) + 1):
        ledger = Ledger.replay(SETTINGS, None, records[:cut], now=100.0)
        loaded = Ledger.replay(SETTINGS, wire.unpack(state_of(ledger)), records[cut:], now=100.0)
        assert state_of(loaded) == state_of(Ledger.replay(SETTINGS, None, records, now=100.0))
        open_tickets = [*ledger.book.leases, *ledger.book.reservations]
        assert ledger.next_deadline() == (100.0 + SETTINGS.lease_timeout if open_tickets else None)
        acked = {name: ledger.status()["consumers"][name]["acked"] for name in SETTINGS.consumers}
        ledger.expire(200.0)
        assert not ledger.book.leases
        assert not ledger.book.reservations
        for consumer, before in acked.items():
            while grant := ledger.lease(LeaseRequest(consumer, 2, 1), None, 200.0):
                ledger.ack(consumer, grant.ticket, grant.keys)
            after = ledger.status()["consumers"][consumer]
            assert after["acked"] >= before
            assert after["ready"] == after["leased"] == 0


def test_a_plan_whose_get_was_killed_is_claimed_after_the_restart() -> None:
    ledger, records = recorded()
    put(ledger, keys_of(range(4)))
    request = LeaseRequest("train", 4, 4, balance=True, rank=0, ranks=2)
    first = ledger.lease(request, HOLDER, 0.0)
    assert [kind for kind, _ in records][-2:] == ["lease", "claim"]
    again = Ledger.replay(SETTINGS, None, records[:-1], now=5.0)
    assert again.lease(request, HOLDER, 5.0) == first
    assert again.status()["consumers"]["train"]["ready"] == 0


def test_tickets_and_the_highest_extent_survive_what_they_were_for() -> None:
    ledger, _ = recorded()
    put(ledger, keys_of([0]))
    grant = ledger.lease(LeaseRequest("train", 2, 2), None, 0.0)
    ledger.release(grant.ticket, grant.keys)
    ledger.close_step(1, False)
    again = Ledger.replay(SETTINGS, ledger.book.state(), [], now=0.0)
    assert ledger.status()["nodes"]["node"]["highest"] == again.book.memory.highest["node"] > 0
    put(again, keys_of([0], step=2))
    assert again.lease(LeaseRequest("train", 2, 2), None, 0.0).ticket == grant.ticket + 2


@pytest.mark.parametrize(
    "act",
    [
        lambda ledger: put(ledger, keys_of([9])),
        lambda ledger: ledger.move(next(iter(ledger.book.reservations)), 0.0),
        lambda ledger: ledger.cancel(next(iter(ledger.book.reservations))),
        lambda ledger: ledger.commit(next(iter(ledger.book.reservations)), keys_of([7], 3), writes_of(keys_of([7], 3))),
        lambda ledger: ledger.lease(LeaseRequest("train", 2, 1), None, 0.0),
        lambda ledger: ledger.lease(LeaseRequest("train", 1, 1, balance=True), None, 0.0),
        lambda ledger: ledger.ack("train", *_held(ledger)),
        lambda ledger: ledger.release(*_held(ledger)),
        lambda ledger: ledger.end_holder(HOLDER, 0.0),
        lambda ledger: ledger.close_step(2, False),
        lambda ledger: ledger.expire(1000.0),
    ],
)
def test_a_record_that_cannot_be_written_changes_nothing(act: Act) -> None:
    ledger, _ = lived()
    ledger.release(*_held(ledger))
    ledger.lease(LeaseRequest("train", 2, 2), HOLDER, 0.0)
    state, status = state_of(ledger), ledger.status()

    def full(kind: str, args: list[Any]) -> None:
        raise DockError("no space left")

    ledger.record = full
    with pytest.raises(DockError, match="no space left"):
        act(ledger)
    assert state_of(ledger) == state
    assert ledger.status() == status
    ledger.record = None
    act(ledger)
    assert state_of(ledger) != state


def _held(ledger: Ledger) -> tuple[int, list[SampleKey]]:
    return next((ticket, list(one.held)) for ticket, one in ledger.book.leases.items() if one.consumer == "train")


def test_an_unknown_transition_is_refused() -> None:
    with pytest.raises(ValueError, match="no transition 'apply'"):
        Book(SETTINGS).apply("apply", [])


# ---- restore ---------------------------------------------------------------------------------------------------


def places_in(ledger: Ledger, node: str) -> list[tuple[str, int, str, int]]:
    """Its extents with live blocks, one behind the other from 4096 on."""
    moved, end = [], 4096
    for (old, offset), extent in sorted(ledger.book.memory.extents.items()):
        if extent.live:
            moved.append((old, offset, node, end))
            end += extent.size
    return moved


def test_a_restored_dock_has_what_was_saved_and_nothing_leased() -> None:
    old, _ = lived()
    grant = old.lease(LeaseRequest("train", 1, 1), HOLDER, 0.0)
    state, moved = wire.unpack(state_of(old)), places_in(old, "new")
    new, records = recorded()
    assert new.restore(state, moved) == {"score", "train"}
    assert old.book.leases
    for record in old.book.leases.values():
        assert set(record.held) <= set(new.book.pools[record.consumer].available())
    with pytest.raises(LeaseLost):
        new.ack("train", grant.ticket, grant.keys)
    before, after = old.status(), new.status()
    for name in ("samples", "columns", "groups_complete", "ages", "bytes_held"):
        assert after[name] == before[name]
    for consumer in SETTINGS.consumers:
        was, now = before["consumers"][consumer], after["consumers"][consumer]
        assert now == was | {"ready": was["ready"] + was["leased"], "leased": 0}
    with pytest.raises(StepClosed):
        new.check_put(keys_of([0], step=0), writes_of(keys_of([0], step=0)))
    with pytest.raises(StepClosed, match="group 0"):
        new.check_put(keys_of([0]), writes_of(keys_of([0])))
    key = [SampleKey(2, 0, 0)]
    there, here = (ledger.read(key, ["tokens"])["tokens"].places[0] for ledger in (old, new))
    [offset] = [at for node, extent, _, at in moved if (node, extent) == there[:2]]
    assert here == ("new", offset, there.size, offset + there.offset - there.extent, there.nbytes)
    again = new.lease(LeaseRequest("train", 2, 2), None, 0.0)
    assert again.ticket > old.book.last_ticket
    assert state_of(Ledger.replay(SETTINGS, None, records, 0.0)) == state_of(new)


def test_a_dock_that_does_not_match_is_not_restored() -> None:
    old, _ = lived()
    state, moved = wire.unpack(state_of(old)), places_in(old, "new")
    others: list[tuple[Settings, str]] = [
        (Settings(SETTINGS.dtypes, SETTINGS.consumers, 4, 4096, 10.0), "samples_per_group=2, here 4"),
        (Settings(SETTINGS.dtypes, {"score": ["tokens"]}, 2, 4096, 10.0), "with consumers .*'train'.* here"),
        (Settings({**SETTINGS.dtypes, "x": "int8"}, SETTINGS.consumers, 2, 4096, 10.0), "with columns .* here .*'x'"),
    ]
    for settings, message in others:
        with pytest.raises(InvalidRequest, match=message):
            Ledger(settings).restore(state, moved)
    used, records = recorded()
    put(used, keys_of([0]))
    with pytest.raises(InvalidRequest, match="nothing was put into"):
        used.restore(state, moved)
    new, records = recorded()
    overlapping = [(node, offset, "new", 0) for node, offset, *_ in moved]
    for wrong, message in [(moved[:-1], "needs one new place"), (overlapping, "node new: .*in use")]:
        with pytest.raises(InvalidRequest, match=message):
            new.restore(state, wrong)
    assert not records
    assert new.restore(state, moved)
