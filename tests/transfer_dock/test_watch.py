"""The end of a process is seen, however it comes, and never a living one's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest

from transfer_dock import watch

PATIENCE = 30.0


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be killed; nobody reaps it before the test is over."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def start_of(process: subprocess.Popen[bytes]) -> float:
    started = watch._started(process.pid)
    assert started is not None
    return started


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_this_process_is_alive_and_started_when_psutil_says() -> None:
    pid, started = watch.identity()
    assert (pid, watch.is_alive(pid, started)) == (os.getpid(), True)
    assert psutil.boot_time() + started == pytest.approx(psutil.Process().create_time(), abs=2.0)
    assert not watch.is_alive(pid, started - 1.0), "another process that had this pid before"


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_killed_child_that_nobody_reaped_has_ended(
    child: subprocess.Popen[bytes], has_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
        monkeypatch.setattr(watch, "_SECONDS_BETWEEN_CHECKS", 0.01)
    started = start_of(child)
    assert watch.is_alive(child.pid, started)

    async def wait() -> None:
        ends = [asyncio.create_task(watch.process_end(child.pid, started)) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(end.done() for end in ends)
        child.kill()
        await asyncio.wait_for(asyncio.gather(*ends), PATIENCE)

    before = open_files()
    asyncio.run(wait())
    assert open_files() == before
    assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    assert not watch.is_alive(child.pid, started)


def test_a_pid_that_is_free_or_belongs_to_another_process_has_ended_at_once(child: subprocess.Popen[bytes]) -> None:
    started = start_of(child)
    asyncio.run(asyncio.wait_for(watch.process_end(child.pid, started - 1.0), PATIENCE))
    child.kill()
    child.communicate()
    asyncio.run(asyncio.wait_for(watch.process_end(child.pid, started), PATIENCE))
    assert not watch.is_alive(child.pid, started)


def test_a_cancelled_wait_leaves_no_file_and_the_process_alone(child: subprocess.Popen[bytes]) -> None:
    started = start_of(child)

    async def wait() -> None:
        before = open_files()
        end = asyncio.create_task(watch.process_end(child.pid, started))
        await asyncio.sleep(0)
        assert open_files() == before + 1
        end.cancel()
        with pytest.raises(asyncio.CancelledError):
            await end
        assert open_files() == before

    asyncio.run(wait())
    assert watch.is_alive(child.pid, started)


def test_a_process_whose_name_looks_like_its_state_is_alive() -> None:
    with open("/proc/self/comm") as file:
        name = file.read()
    try:
        with open("/proc/self/comm", "w") as file:
            file.write("x) Z 1 (y")
        assert watch.is_alive(*watch.identity())
    finally:
        with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
            file.write(name)
