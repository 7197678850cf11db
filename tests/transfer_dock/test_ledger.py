"""Examples of the ledger's decisions: balanced parts, staleness, room by groups, and what its messages say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from transfer_dock.columns import ColumnWrite, encode
from transfer_dock.errors import ColumnMismatch, InvalidRequest, UnknownColumn, UnknownConsumer
from transfer_dock.explain import explain_get, explain_put
from transfer_dock.jagged import Jagged
from transfer_dock.keys import SampleKey
from transfer_dock.ledger import Ledger
from transfer_dock.records import LeaseRequest, Reservation, Settings

COLUMNS = {"tokens": "int32", "masks": "uint8", "rewards": "float32", "notes": "str"}
SETTINGS = Settings(COLUMNS, {"train": ["tokens", "masks", "rewards"], "log": ["rewards", "notes"]}, 4, 1 << 20, 10.0)


def keys_of(groups: Sequence[int], step: int = 1) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in range(4)]


def length(key: SampleKey) -> int:
    return int(20 * np.random.default_rng(tuple(key)).lognormal()) + 1


def writes_of(keys: Sequence[SampleKey], *columns: str) -> dict[str, ColumnWrite]:
    values = {
        "tokens": Jagged.from_rows([np.zeros(length(key), np.int32) for key in keys]),
        "masks": Jagged.from_rows([np.zeros(length(key), np.uint8) for key in keys]),
        "rewards": np.ones(len(keys), np.float32),
        "notes": ["note"] * len(keys),
    }
    return {name: encode(name, COLUMNS[name], values[name], len(keys)).with_digests() for name in columns or COLUMNS}


def reserve(
    ledger: Ledger, keys: Sequence[SampleKey], *columns: str, holder: list | None = None
) -> tuple[Reservation | None, dict[str, ColumnWrite]]:
    writes = writes_of(keys, *columns)
    return ledger.reserve(keys, writes, ledger.check_put(keys, writes), "node", holder, 0.0), writes


def put(ledger: Ledger, keys: Sequence[SampleKey], *columns: str, holder: list | None = None) -> None:
    reservation, writes = reserve(ledger, keys, *columns, holder=holder)
    assert reservation is not None
    ledger.commit(reservation.ticket, keys, writes)


def balanced(count: int, **others: object) -> LeaseRequest:
    return LeaseRequest("train", count, count, balance=True, **others)  # type: ignore[arg-type]


# ---- balanced parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_groups", [False, True])
def test_ranks_get_parts_with_similar_token_sums(whole_groups: bool) -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of(range(64)))
    grants = [
        ledger.lease(balanced(32, rank=rank, ranks=8, whole_groups=whole_groups), None, 0.0)
        for rank in (*range(7, -1, -1),)
    ]
    keys = [key for grant in grants for key in grant.keys]
    assert sorted(keys) == keys_of(range(64))
    assert all(len(grant.keys) == 32 for grant in grants)
    sums = [sum(map(length, grant.keys)) for grant in grants]
    contiguous = [sum(map(length, sorted(keys)[first : first + 32])) for first in range(0, 256, 32)]
    assert max(sums) - min(sums) < (max(contiguous) - min(contiguous)) / 10
    assert ledger.lease(balanced(32, rank=0, ranks=8, whole_groups=whole_groups), None, 0.0) is None


def test_parts_without_ranks_go_to_whoever_asks() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of(range(8)))
    grants = [ledger.lease(balanced(6), None, 0.0) for _ in range(5)]
    assert sorted(key for grant in grants for key in grant.keys) == keys_of(range(8))[:30]
    sums = [sum(map(length, grant.keys)) for grant in grants]
    assert max(sums) - min(sums) <= max(map(length, keys_of(range(8))))
    assert ledger.lease(balanced(6), None, 0.0) is None
    assert ledger.lease(balanced(2), None, 0.0) is not None


def test_a_rank_takes_its_parts_in_the_order_of_the_plans() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of(range(2)))
    plans = [[ledger.lease(balanced(2, rank=0, ranks=2), None, 0.0)] for _ in range(2)]
    for plan in plans:
        plan.append(ledger.lease(balanced(2, rank=1, ranks=2), None, 0.0))
    for plan, group in zip(plans, ([0], [1]), strict=True):
        assert sorted(key for grant in plan for key in grant.keys) == keys_of(group)


def test_a_part_that_nobody_claims_runs_out_of_time_and_a_claim_gives_it_more() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of(range(3)))
    ledger.lease(balanced(4, rank=0, ranks=3), None, 5.0)
    ledger.lease(balanced(4, rank=1, ranks=3), None, 9.0)
    assert ledger.expire(14.9) == set()
    assert ledger.expire(15.0) == {"train"}
    assert ledger.status()["consumers"]["train"] == {"ready": 8, "leased": 4, "acked": 0, "dropped": 0}
    assert ledger.next_deadline() == 19.0


def test_a_part_that_lost_samples_with_their_step_is_not_handed_out() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of([0, 1]))
    put(ledger, keys_of([0, 1], step=2))
    claimed = ledger.lease(balanced(8, rank=0, ranks=2), None, 0.0)
    kept = [key for key in claimed.keys if key.step == 2]
    assert 0 < len(kept) < 8
    ledger.close_step(1, False)
    assert ledger.holds(claimed.ticket, kept)
    assert ledger.status()["consumers"]["train"] == {
        "ready": 8 - len(kept),
        "leased": len(kept),
        "acked": 0,
        "dropped": 0,
    }
    assert ledger.lease(balanced(8, rank=1, ranks=2), None, 0.0) is None


def test_a_part_is_not_handed_out_once_somebody_acknowledged_or_released_some_of_it() -> None:
    for end in ("ack", "release"):
        ledger = Ledger(SETTINGS)
        put(ledger, keys_of([0, 1]))
        for rank in (0, 1):
            claimed = ledger.lease(balanced(2, rank=rank, ranks=4), None, 0.0)
        [first, second] = [(number, list(lease.held)) for number, lease in ledger.book.leases.items() if lease.tag]
        assert claimed.ticket < first[0]
        if end == "ack":
            ledger.ack("train", first[0], first[1][:1])
        else:
            ledger.release(first[0], first[1][:1])
        assert ledger.lease(balanced(2, rank=2, ranks=4), None, 0.0) is None
        assert ledger.lease(balanced(2, rank=3, ranks=4), None, 0.0).keys == second[1]


def test_a_part_that_became_too_old_is_not_handed_out() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of([0]))
    ledger.lease(balanced(2, rank=0, ranks=2, max_staleness=0), None, 0.0)
    ledger.close_step(1, True)
    assert ledger.lease(balanced(2, rank=1, ranks=2, max_staleness=0), None, 0.0) is None
    assert ledger.status()["consumers"]["train"]["ready"] == 2


def test_tokens_are_counted_in_the_columns_that_were_named() -> None:
    ledger = Ledger(replace(SETTINGS, token_columns=("masks",)))
    keys = keys_of([0])
    lengths = {"tokens": [1, 1, 9, 9], "masks": [1, 9, 1, 9]}
    writes = writes_of(keys) | {
        name: encode(name, COLUMNS[name], [np.zeros(size, COLUMNS[name]) for size in lengths[name]], 4).with_digests()
        for name in lengths
    }
    ledger.commit(ledger.reserve(keys, writes, list(writes), "node", None, 0.0).ticket, keys, writes)
    masks = dict(zip(keys, lengths["masks"], strict=True))
    for rank in (0, 1):
        assert sum(masks[key] for key in ledger.lease(balanced(2, rank=rank, ranks=2), None, 0.0).keys) == 10


# ---- staleness and room ----------------------------------------------------------------------------------------


def test_old_groups_wait_or_are_dropped_and_free_their_memory() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of([0]))
    ledger.ack("log", ledger.lease(LeaseRequest("log", 4, 4), None, 0.0).ticket, keys_of([0]))
    for _ in range(2):
        ledger.close_step(1, True)
    put(ledger, keys_of([0], step=2))
    fresh = LeaseRequest("train", 4, 4, max_staleness=1)
    assert ledger.status()["ages"] == {0: 1, 2: 1}
    grant = ledger.lease(fresh, None, 0.0)
    assert grant[1:] == (keys_of([0], step=2), [0] * 4)
    ledger.release(grant.ticket, grant.keys)
    assert ledger.lease(LeaseRequest("train", 1, 1, max_staleness=2), None, 0.0).ages == [2]
    before = ledger.status()
    assert ledger.lease(replace(fresh, stale="drop", whole_groups=True), None, 0.0).keys == keys_of([0], step=2)
    assert ledger.status()["consumers"]["train"]["dropped"] == 0, "one of the group is leased"
    ledger.expire(10.0)
    ledger.lease(replace(fresh, stale="drop", whole_groups=True), None, 20.0)
    assert ledger.status()["consumers"]["train"] == {"ready": 0, "leased": 4, "acked": 0, "dropped": 4}
    assert 0 < ledger.status()["bytes_held"] < before["bytes_held"]
    assert ledger.status()["groups_open"] == 1


def test_a_group_that_all_left_is_young_again_when_others_enter() -> None:
    ledger = Ledger(SETTINGS)
    put(ledger, keys_of([0])[:1])
    ledger.close_step(1, True)
    assert ledger.status()["ages"] == {1: 1}
    for consumer in SETTINGS.consumers:
        ledger.ack(consumer, ledger.lease(LeaseRequest(consumer, 1, 1), None, 0.0).ticket, keys_of([0])[:1])
    assert ledger.close_step(1, True) == 1
    assert ledger.status()["ages"] == {}
    put(ledger, keys_of([0])[1:])
    assert ledger.status()["ages"] == {0: 1}


def test_a_put_waits_for_room_for_its_groups_but_not_for_open_ones() -> None:
    ledger = Ledger(replace(SETTINGS, capacity_groups=2))
    put(ledger, keys_of([0]), "tokens")
    first, _ = reserve(ledger, keys_of([1]), "tokens")
    assert reserve(ledger, keys_of([2]), "tokens")[0] is None
    assert reserve(ledger, keys_of([0, 1]), "rewards")[0] is not None
    ledger.cancel(first.ticket)
    assert ledger.status()["groups_open"] == 2, "the second put enters group 1 too"
    text = explain_put(ledger, keys_of([2, 3, 4]), writes_of(keys_of([2, 3, 4])), 1.0)
    assert "put waited 1.0 s for room for 3 groups (2 open of 2)" in text
    assert "'train' has not acknowledged 4 of 4 samples" in text
    with pytest.raises(InvalidRequest, match="samples of 3 groups can never fit into capacity_groups=2"):
        reserve(ledger, keys_of([2, 3, 4]), "tokens")


def test_a_put_that_can_never_fit_is_refused() -> None:
    ledger = Ledger(replace(SETTINGS, capacity_bytes=100))
    with pytest.raises(InvalidRequest, match="can never fit into capacity_bytes=100"):
        reserve(ledger, keys_of(range(20)), "tokens")


def test_a_repeated_reserve_gets_the_same_memory_and_a_repeated_commit_is_done() -> None:
    ledger = Ledger(SETTINGS)
    keys, writes = keys_of([0]), writes_of(keys_of([0]))
    found = [ledger.reserve(keys, writes, list(writes), "node", None, 0.0, b"put") for _ in range(2)]
    assert found[0] == found[1]
    assert ledger.commit(found[0].ticket, keys, writes) == {"train", "log"}
    assert ledger.commit(found[0].ticket, keys, writes) == set()
    assert ledger.reserve(keys, writes, ledger.new_columns(keys, writes), "node", None, 0.0, b"put").ticket == 0


def test_a_commit_of_another_size_than_reserved_is_refused() -> None:
    ledger = Ledger(SETTINGS)
    reservation, _ = reserve(ledger, keys_of([0]), "tokens")
    with pytest.raises(InvalidRequest, match="it reserved"):
        ledger.commit(reservation.ticket, keys_of(range(9)), writes_of(keys_of(range(9)), "tokens"))
    with pytest.raises(InvalidRequest, match="has not written tokens"):
        ledger.commit(reservation.ticket, keys_of([0]), writes_of(keys_of([0]), "masks"))
    with pytest.raises(ColumnMismatch, match="4 rows for 8 keys"):
        ledger.commit(reservation.ticket, keys_of([0, 1]), writes_of(keys_of([0]), "tokens"))


# ---- refusals and messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (LeaseRequest("trian", 1, 1), UnknownConsumer, "did you mean 'train'"),
        (LeaseRequest("train", 1, 2), InvalidRequest, "1 <= minimum <= count"),
        (LeaseRequest("train", 6, 4, whole_groups=True), InvalidRequest, "multiples of samples_per_group=4"),
        (LeaseRequest("train", 1, 1, stale="keep"), InvalidRequest, "stale='wait' or 'drop', got 'keep'"),
        (LeaseRequest("train", 1, 1, max_staleness=-1), InvalidRequest, "max_staleness >= 0"),
        (LeaseRequest("train", 2, 1, balance=True), InvalidRequest, "minimum=1, count=2"),
        (LeaseRequest("train", 1, 1, rank=0, ranks=1), InvalidRequest, "only for balanced parts"),
        (LeaseRequest("train", 1, 1, balance=True, rank=0), InvalidRequest, "rank and ranks together"),
        (LeaseRequest("train", 1, 1, balance=True, rank=2, ranks=2), InvalidRequest, "got 2 and 2"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(request_: LeaseRequest, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Ledger(SETTINGS).lease(request_, None, 0.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"consumers": {"train": ["token"]}}, UnknownColumn, "consumer 'train': .*did you mean 'tokens'"),
        ({"consumers": {"train": []}}, InvalidRequest, "reads no column"),
        ({"token_columns": ("x",)}, UnknownColumn, "token_columns"),
        ({"token_columns": ("notes",)}, InvalidRequest, "token column 'notes' is 'str'"),
        ({"capacity_groups": 0}, InvalidRequest, "must be positive: capacity_groups=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        replace(SETTINGS, **changed)
    assert Settings.from_data(SETTINGS.as_data()) == SETTINGS


def test_a_token_column_of_fixed_size_rows_is_refused() -> None:
    ledger = Ledger(replace(SETTINGS, token_columns=("rewards",)))
    assert ledger.lease(balanced(2), None, 0.0) is None
    put(ledger, keys_of([0]))
    with pytest.raises(InvalidRequest, match="token column 'rewards' holds fixed-size rows"):
        ledger.lease(balanced(2), None, 0.0)


def test_a_get_that_waited_says_what_is_missing_and_who_puts_it() -> None:
    ledger = Ledger(SETTINGS)
    for number in range(6):
        put(ledger, keys_of([number]), "tokens", "rewards", holder=["ab12cd34ef", 100 + number, 0.5])
    put(ledger, keys_of([0]), "masks", holder=["ab12cd34ef", 7, 0.5])
    ledger.close_step(1, True)
    request = LeaseRequest("train", 8, 5, whole_groups=False, max_staleness=0)
    text = explain_get(ledger, request, 2.0)
    assert "get('train') waited 2.0 s for 5 to 8 samples" in text
    assert "the dock holds 24 of them: 4 ready, 0 leased, 0 acknowledged, 20 with missing columns" in text
    assert "column 'masks' is missing on 20 samples (step 1: group 1 [0-3], " in text
    assert "put so far by pid 7 on node ab12cd34" in text
    assert "4 samples older than max_staleness=0 (step 1: group 0 [0-3])" in text
    text = explain_get(ledger, LeaseRequest("log", 4, 4), 2.0)
    assert "column 'notes' is missing on 24 samples" in text
    assert text.endswith("nobody has put it yet")
    put(ledger, keys_of([9]), "masks")
    text = explain_get(ledger, LeaseRequest("train", 4, 4, step=1), 2.0)
    shown = ", ".join(f"pid {100 + number} on node ab12cd34" for number in (5, 4, 3, 2))
    assert f"column 'tokens' is missing on 4 samples (step 1: group 9 [0-3]), put so far by {shown} and 2 more" in text
