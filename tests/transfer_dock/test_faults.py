"""Deadlines, back-pressure, lost leases and dead processes: a bounded, typed end."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import ray

from transfer_dock import Batch, DockClosed, DockTimeout, LeaseLost, SampleKey, StepClosed, TransferDock

KILOBYTE = np.zeros((4, 64), np.float32)
MakeDock = Callable[..., TransferDock]
Until = Callable[[Callable[[], bool]], None]


def group(number: int, step: int = 1) -> list[SampleKey]:
    return [SampleKey(step, number, index) for index in range(4)]


@ray.remote(num_cpus=0)
class Process:
    def put(self, dock: TransferDock, keys: list[SampleKey]) -> None:
        dock.put({"log_probs": KILOBYTE}, keys)

    def look(self, batch: Batch) -> str:
        try:
            return str(batch.columns["log_probs"])
        except LeaseLost as error:
            return str(error)

    def take(self, dock: TransferDock, count: int) -> list[SampleKey]:
        return list(dock.get("train", count).keys)


@pytest.fixture
def small_dock(make_dock: MakeDock) -> TransferDock:
    """Room for two groups of a kilobyte."""
    return make_dock(consumers={"train": ["log_probs"], "log": ["log_probs"]}, capacity_bytes=2100)


def finish(dock: TransferDock, count: int) -> None:
    for consumer in ("train", "log"):
        dock.ack(dock.get(consumer, count))


@pytest.mark.parametrize("way", ["ack", "close_step"])
def test_a_full_dock_holds_a_put_until_memory_is_free(small_dock: TransferDock, until: Until, way: str) -> None:
    for number in range(2):
        small_dock.put({"log_probs": KILOBYTE}, group(number))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(small_dock.put, {"log_probs": KILOBYTE}, group(0, step=2))
        until(lambda: small_dock.status()["puts_waiting"] == 1)
        assert small_dock.status()["bytes_held"] == 2048
        if way == "ack":
            finish(small_dock, 4)
        else:
            small_dock.close_step(1, carry_unfinished=False)
        waiting.result(timeout=30)
    assert small_dock.status()["bytes_held"] == (2048 if way == "ack" else 1024)
    assert [key.step for key in small_dock.get("train", 4, step=2).keys] == [2] * 4


def test_columns_of_samples_in_the_dock_go_before_new_samples(make_dock: MakeDock, until: Until) -> None:
    consumers = {"reward": ["log_probs"], "train": ["log_probs", "rewards"]}
    dock = make_dock(consumers=consumers, capacity_bytes=2100)
    for number in range(2):
        dock.put({"log_probs": KILOBYTE}, group(number))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dock.put, {"log_probs": KILOBYTE}, group(2))
        until(lambda: dock.status()["puts_waiting"] == 1)
        dock.put({"rewards": np.zeros(4, np.float32)}, group(0), timeout=10.0)
        assert dock.status()["puts_waiting"] == 1
        dock.ack(dock.get("reward", 4))
        dock.ack(dock.get("train", 4))
        waiting.result(timeout=30)


def test_a_put_past_its_deadline_names_who_is_behind_and_leaves_nothing(small_dock: TransferDock) -> None:
    for number in range(2):
        small_dock.put({"log_probs": KILOBYTE}, group(number))
    small_dock.ack(small_dock.get("log", 3))
    before = small_dock.status()
    with pytest.raises(DockTimeout, match=r"room for 1024 bytes \(2048 bytes held.*of 2100\)") as caught:
        small_dock.put({"log_probs": KILOBYTE}, group(2), timeout=0.2)
    assert "'train' has not acknowledged 8 of 8 samples; 'log' has not acknowledged 5 of 8" in str(caught.value)
    assert small_dock.status() == before


def test_a_get_past_its_deadline_names_consumer_columns_and_samples(make_dock: MakeDock) -> None:
    dock = make_dock()
    keys = group(0) + group(1)
    dock.put({"responses": [np.zeros(2, np.int32)] * 8}, keys)
    dock.put({"prompts": [np.zeros(2, np.int32)] * 6, "answers": ["a"] * 6}, keys[:6])
    with pytest.raises(DockTimeout) as caught:
        dock.get("reward", 8, whole_groups=True, timeout=0.2)
    message = str(caught.value)
    assert re.match(r"get\('reward'\) waited [\d.]+ s for 8 samples in whole groups of 4; the dock holds", message)
    assert "holds 8 of them: 6 ready, 0 leased, 0 acknowledged, 2 with missing columns" in message
    assert "'prompts' is missing on 2 samples (step 1: group 1 [2-3])" in message
    assert "ready samples of incomplete groups: step 1: group 1 [0-1]" in message
    with pytest.raises(DockTimeout, match="no producer has put the others"):
        dock.get("reward", 1, step=9, timeout=0.1)


def test_an_expired_lease_returns_to_the_pool_and_its_late_ack_is_refused(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]}, lease_timeout=3.0)
    dock.put({"log_probs": KILOBYTE}, group(0))
    lost = dock.get("train", 4, whole_groups=True)
    again = dock.get("train", 4, whole_groups=True, timeout=20.0)
    assert again.keys == lost.keys
    with pytest.raises(LeaseLost, match=rf"'train' acknowledged step 1: group 0 \[0-3\] under lease {lost.lease[0]}"):
        dock.ack(lost)
    dock.ack(again)
    dock.ack(again)
    assert dock.status()["consumers"]["train"] == {"ready": 0, "leased": 0, "acked": 4, "dropped": 0}


def test_a_killed_consumer_lease_returns_to_the_pool(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]})
    dock.put({"log_probs": KILOBYTE}, group(0))
    process = Process.remote()
    assert ray.get(process.take.remote(dock, 4)) == group(0)
    ray.kill(process)
    assert list(dock.get("train", 4, timeout=20.0).keys) == group(0)


def test_the_part_of_a_whole_group_that_was_acknowledged_comes_back_with_the_rest(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]})
    dock.put({"log_probs": KILOBYTE}, group(0))
    half, rest = dock.get("train", 4, whole_groups=True).split([[0, 1], [2, 3]])
    dock.ack(half)
    dock.release(rest)
    assert list(dock.get("train", 4, whole_groups=True).keys) == group(0)
    with pytest.raises(LeaseLost):
        dock.ack(half)


def test_a_killed_controller_ends_every_wait_with_dock_closed(make_dock: MakeDock, until: Until) -> None:
    dock = make_dock()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dock.get, "train", 1)
        until(lambda: dock.status()["gets_waiting"]["train"] == 1)
        dock.close()
        with pytest.raises(DockClosed):
            waiting.result(timeout=30)
    with pytest.raises(DockClosed, match="reserve found"):
        dock.put({"log_probs": KILOBYTE}, group(0))


def test_a_dock_is_closed_on_the_way_out_and_leaves_no_files(make_dock: MakeDock) -> None:
    with make_dock(consumers={"train": ["log_probs"]}) as dock:
        dock.put({"log_probs": KILOBYTE}, group(0))
        values, home = dock.get("train", 4).columns["log_probs"], dock._access.home
        assert os.path.exists(home.path)
        assert os.path.exists(home.journal)
    assert not os.path.exists(home.path)
    assert not os.path.exists(home.journal)
    with pytest.raises(DockClosed):
        dock.status()
    assert np.array_equal(values, KILOBYTE), "what is looked at stays"


def test_what_a_dead_producer_put_is_still_there(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]})
    process = Process.remote()
    ray.get(process.put.remote(dock, group(0)))
    ray.kill(process)
    assert np.array_equal(dock.get("train", 4).columns["log_probs"], KILOBYTE)


def test_a_column_first_looked_at_elsewhere_after_the_ack_is_refused(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]})
    dock.put({"log_probs": KILOBYTE}, group(0))
    batch, process = dock.get("train", 4), Process.remote()
    dock.ack(batch)
    found = ray.get(process.look.remote(batch))
    assert re.match(r"the columns of step 1: group 0 \[0-3\] can't be read any more: .* before the ack", found)
    assert np.array_equal(batch.columns["log_probs"], KILOBYTE), "whoever took the lease still holds its memory"


def test_a_put_that_slept_past_its_reservation_writes_nothing(make_dock: MakeDock, until: Until) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]}, lease_timeout=0.5)
    arena = dock._access.arena

    def late() -> object:
        until(lambda: dock.status()["bytes_reserved"] == 0)
        return arena()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dock._access, "arena", late)
        with pytest.raises(DockTimeout, match="was not written within"):
            dock.put({"log_probs": KILOBYTE}, group(0))
    assert dock.status()["samples"] == dock.bytes_put == 0
    dock.put({"log_probs": KILOBYTE}, group(0))


def test_a_closed_step_takes_and_gives_nothing(make_dock: MakeDock, until: Until) -> None:
    dock = make_dock(consumers={"train": ["log_probs"]})
    dock.put({"log_probs": KILOBYTE}, group(0))
    leased = dock.get("train", 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dock.get, "train", 4, step=1)
        until(lambda: dock.status()["gets_waiting"]["train"] == 1)
        assert dock.close_step(1, carry_unfinished=False) == 4
        with pytest.raises(StepClosed, match="step 1, which is closed"):
            waiting.result(timeout=30)
    with pytest.raises(LeaseLost):
        dock.ack(leased)
    with pytest.raises(StepClosed):
        dock.put({"log_probs": KILOBYTE}, group(1))
    assert dock.status()["samples"] == dock.status()["bytes_held"] == 0


def test_unfinished_samples_are_carried_over_a_closed_step(small_dock: TransferDock) -> None:
    small_dock.put({"log_probs": KILOBYTE}, group(0))
    finish(small_dock, 3)
    assert small_dock.close_step(1, carry_unfinished=True) == 3
    assert [key.index for key in small_dock.get("train", 1).keys] == [3]
    small_dock.put({"log_probs": KILOBYTE}, group(1))
    with pytest.raises(StepClosed, match=r"group 0 \[0\] left the dock"):
        small_dock.put({"log_probs": KILOBYTE}, group(0))
