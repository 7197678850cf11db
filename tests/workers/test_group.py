"""Calls on workers end in time, and say who failed."""

import pytest
import ray

from workers import Pending, WorkerError
from workers.group import local_ranks


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Gate:
    """Answers `wait` once `open` was called; until then it blocks, as a rank stuck in a collective does."""

    def __init__(self):
        import asyncio

        self.event = asyncio.Event()

    async def open(self):
        self.event.set()

    async def wait(self):
        await self.event.wait()
        return "through"

    async def fail(self, text):
        raise ValueError(text)

    async def leave(self):
        import os

        os._exit(3)


def test_results_come_in_call_order_whatever_ends_first():
    first, second = Gate.remote(), Gate.remote()
    pending = Pending([first.wait.remote(), second.open.remote()], ["first", "second"])
    ray.get(second.open.remote())
    first.open.remote()
    assert pending.wait(timeout_s=30) == ["through", None]


def test_a_failure_ends_the_wait_though_a_peer_is_stuck():
    stuck, broken = Gate.remote(), Gate.remote()
    names = ["worker 0 in update", "worker 1 in update"]
    pending = Pending([stuck.wait.remote(), broken.fail.remote("no shard")], names)
    with pytest.raises(WorkerError, match=r"worker 1 in update failed: ValueError: no shard"):
        pending.wait(timeout_s=60)


def test_a_deadline_names_who_is_missing():
    with pytest.raises(WorkerError, match=r"waited 1 s for worker 0 in generate"):
        Pending([Gate.remote().wait.remote()], ["worker 0 in generate"]).wait(timeout_s=1)


def test_a_dead_worker_is_named():
    with pytest.raises(WorkerError, match="worker 0 in start died"):
        Pending([Gate.remote().leave.remote()], ["worker 0 in start"]).wait(timeout_s=60)


def test_progress_is_shown_while_waiting():
    gate, seen = Gate.remote(), []

    def progress():
        seen.append(True)
        if len(seen) == 2:
            gate.open.remote()

    assert Pending([gate.wait.remote()], ["gate"]).wait(timeout_s=60, on_wait=progress) == ["through"]
    assert len(seen) >= 2


def test_ranks_of_a_machine_take_one_card_after_the_other():
    assert local_ranks(["a", "a", "b", "a", "b"]) == [0, 1, 0, 2, 1]
