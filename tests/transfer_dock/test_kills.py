"""SIGKILL at every point: the run goes on, and every sample is acknowledged once by each consumer."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.exceptions import RayActorError

import transfer_dock.dock
from tests.transfer_dock.fragile import PLAN, FragileController, make_fragile
from transfer_dock import Batch, Jagged, SampleKey, TransferDock
from transfer_dock.calls import ask
from transfer_dock.columns import encode
from transfer_dock.keys import pack_keys

SIZE = 4
COLUMNS = {"responses": "int32", "rewards": "float32"}
CONSUMERS = {"reward": ["responses"], "train": ["responses", "rewards"], "log": ["rewards"]}
# Every transition that a dock in use writes; `restore` is a restored dock's first.
KINDS = ("reserve", "move", "cancel", "commit", "lease", "claim", "ack", "release", "drop", "close")
Acked = Counter[tuple[str, SampleKey]]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the controllers look up when to die."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLAN, str(path))
        patch.setattr(transfer_dock.dock, "Controller", FragileController)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield path
        ray.shutdown()


@pytest.fixture
def make_dock(plan: Path) -> Iterator[Callable[..., TransferDock]]:
    docks: list[TransferDock] = []

    def make(restore: str | None = None) -> TransferDock:
        options = {"columns": COLUMNS, "consumers": CONSUMERS, "samples_per_group": SIZE, "capacity_bytes": 1 << 20}
        docks.append(TransferDock.create(**options, timeout=60.0, restore=restore))
        return docks[-1]

    yield make
    for dock in docks:
        dock.close()


def keys_of(groups: range, step: int) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in range(SIZE)]


def responses_of(keys: list[SampleKey]) -> list[np.ndarray]:
    return [np.arange(3 + key.index + key.group, dtype=np.int32) * key.step for key in keys]


def reward(row: np.ndarray) -> float:
    return float(row.sum())


def finish(dock: TransferDock, batch: Batch, acked: Acked) -> None:
    dock.ack(batch)
    acked.update((batch.lease.consumer, key) for key in batch.keys)


def score(dock: TransferDock, batch: Batch) -> None:
    dock.put({"rewards": [reward(row) for row in batch.columns["responses"].rows()]}, batch.keys)


def check_rewards(batch: Batch) -> None:
    for key, value in zip(batch.keys, batch.columns["rewards"], strict=True):
        assert value == reward(responses_of([key])[0])


def begun_and_given_up(dock: TransferDock, key: SampleKey) -> None:
    """A put that ends between its reservation and its commit."""
    write = encode("responses", "int32", Jagged.from_rows(responses_of([key])), 1).write
    access = dock._access
    arguments = (pack_keys([key]), {"responses": write.as_data()}, access.node, access.holder, b"request")
    _, (ticket, *_) = dock._caller.run(ask("reserve", *arguments))
    dock._caller.run(ask("cancel", ticket))


def every_transition(dock: TransferDock) -> Acked:
    """Two steps in which a dock does all that it can. Returns how often each consumer acknowledged each sample."""
    acked: Acked = Counter()
    first, second = keys_of(range(4), step=1), keys_of(range(4), step=2)
    begun_and_given_up(dock, first[0])
    dock.put({"responses": responses_of(first)}, first)
    dock.release(dock.get("reward", SIZE, whole_groups=True))
    for _ in range(2):
        batch = dock.get("reward", 2 * SIZE, whole_groups=True)
        score(dock, batch)
        finish(dock, batch, acked)
    for rank in (1, 0):
        share = dock.get("train", SIZE, whole_groups=True, balance_tokens=True, rank=rank, ranks=2)
        check_rewards(share)
        finish(dock, share, acked)
    finish(dock, dock.get("log", 4 * SIZE), acked)
    # A view into the memory of finished samples; the next put is offered that memory, and has to move on.
    looking = batch.columns["responses"].values
    assert dock.close_step(1, carry_unfinished=True) == 2 * SIZE
    dock.put({"responses": responses_of(second)}, second)
    seen = looking.copy()
    fresh = dock.get("reward", 4 * SIZE)
    score(dock, fresh)
    finish(dock, fresh, acked)
    late = dock.get("train", 4 * SIZE, max_staleness=0, stale="drop")
    assert list(late.keys) == second, "the carried groups of step 1 are too old"
    check_rewards(late)
    finish(dock, late, acked)
    finish(dock, dock.get("log", 4 * SIZE), acked)
    assert np.array_equal(looking, seen)
    return acked


@pytest.mark.parametrize("when", ["torn", "after"])
def test_a_controller_killed_at_any_transition_goes_on_from_its_journal(
    plan: Path, make_dock: Callable[..., TransferDock], when: str
) -> None:
    plan.write_text(json.dumps(dict.fromkeys(KINDS, when)))
    dock = make_dock()
    acked = every_transition(dock)
    assert json.loads(plan.read_text()) == {}, "it was killed at each"
    assert set(acked.values()) == {1}
    assert sum(acked.values()) == 3 * 2 * 4 * SIZE - 2 * SIZE, "all but the two groups that train dropped"
    status = dock.status()
    assert status["consumers"]["train"]["dropped"] == 2 * SIZE
    assert (status["bytes_held"], status["bytes_reserved"]) == (0, 0)
    dock.close_step(2, carry_unfinished=False)
    assert dock.status()["samples"] == 2 * SIZE


@pytest.mark.parametrize("when", ["torn", "after"])
def test_a_controller_killed_while_it_restores_has_restored(
    plan: Path, make_dock: Callable[..., TransferDock], tmp_path: Path, when: str
) -> None:
    saved, keys = make_dock(), keys_of(range(3), step=1)
    saved.put({"responses": responses_of(keys)}, keys)
    saved.ack(saved.get("reward", SIZE))
    saved.save(str(tmp_path / "dock"))
    plan.write_text(json.dumps({"restore": when}))
    dock = make_dock(restore=str(tmp_path / "dock"))
    assert json.loads(plan.read_text()) == {}, "it was killed"
    batch = dock.get("reward", 2 * SIZE)
    assert list(batch.keys) == keys[SIZE:]
    assert all(map(np.array_equal, batch.columns["responses"], responses_of(keys[SIZE:])))


@ray.remote(num_cpus=0)
class Stage:
    def pid(self) -> int:
        return os.getpid()

    def produce(self, dock: TransferDock, keys: list[SampleKey], last_need: int) -> None:
        make_fragile(dock, last_need)
        dock.put({"responses": responses_of(keys)}, keys)

    def consume(self, dock: TransferDock, count: int, last_need: int) -> list[SampleKey]:
        make_fragile(dock, last_need)
        batch = dock.get("reward", count, whole_groups=True)
        score(dock, batch)
        dock.ack(batch)
        return list(batch.keys)


def until_it_is_done(call: Callable[[int], ray.ObjectRef]) -> tuple[list[object], int]:
    """Run `call(last_need)` with one more need each time, each in a process of its own; its results and its deaths."""
    deaths = 0
    while True:
        try:
            return ray.get(call(deaths), timeout=60), deaths
        except RayActorError:
            deaths += 1


def test_a_producer_killed_anywhere_in_a_put_leaves_all_of_it_or_nothing(
    make_dock: Callable[..., TransferDock],
) -> None:
    dock, keys = make_dock(), keys_of(range(2), step=1)
    _, deaths = until_it_is_done(lambda need: Stage.remote().produce.remote(dock, keys, need))
    assert deaths == 4, "before encoding, reserving, writing and committing"
    batch = dock.get("reward", len(keys), whole_groups=True)
    for row, expected in zip(batch.columns["responses"], responses_of(keys), strict=True):
        np.testing.assert_array_equal(row, expected)
    assert dock.status()["bytes_reserved"] == 0, "the dead gave back what they had reserved"


def test_a_consumer_killed_anywhere_hands_its_samples_to_the_next(make_dock: Callable[..., TransferDock]) -> None:
    dock, keys = make_dock(), keys_of(range(2), step=1)
    dock.put({"responses": responses_of(keys)}, keys)
    found, deaths = until_it_is_done(lambda need: Stage.remote().consume.remote(dock, len(keys), need))
    assert found == keys
    assert deaths == 6, "before leasing, encoding, reserving, writing, committing and acknowledging"
    assert dock.status()["consumers"]["reward"] == {"ready": 0, "leased": 0, "acked": len(keys), "dropped": 0}
    for consumer in ("train", "log"):
        batch = dock.get(consumer, len(keys))
        check_rewards(batch)
        dock.ack(batch)
    assert dock.status()["bytes_held"] == 0
