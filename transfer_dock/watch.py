"""Does that process still live? Told by its pid and when it started: the pid alone may be another's by now."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_SECONDS_BETWEEN_CHECKS = 1.0


def identity() -> tuple[int, float]:
    """(pid, start) of this process; start in seconds since the machine was booted.

    Not since 1970, as psutil gives it: that one moves when the machine's clock is set, and a living process would be
    taken for a dead one.
    """
    pid = os.getpid()
    started = _started(pid)
    assert started is not None, "/proc shows this process"
    return pid, started


def is_alive(pid: int, started: float) -> bool:
    """Does the process that `identity` described still run? One that ended and was not reaped yet does not."""
    return _started(pid) == started


async def process_end(pid: int, started: float) -> None:
    """Return when that process has ended: at once when it has, or when its pid belongs to another one by now.

    May be cancelled. Raises: OSError when no file can be opened to wait on (too many open files).
    """
    try:
        file = _open_process(pid)
    except ProcessLookupError:
        return
    if file is None:
        while is_alive(pid, started):
            await asyncio.sleep(_SECONDS_BETWEEN_CHECKS)
        return
    try:
        # After opening: if this is the one, the file means it for good, whoever gets its pid later.
        if is_alive(pid, started):
            await _readable(file)
    finally:
        os.close(file)


def _started(pid: int) -> float | None:
    """Seconds from boot to the start of a process; None when there is none or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may hold anything; behind it come state (field 3 of proc(5)) ... starttime (field 22).
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZXx" else int(fields[19]) / _CLOCK_TICKS


def _open_process(pid: int) -> int | None:
    """A file that becomes readable when the process ends, or None where there is no such thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        # A sandbox may forbid what its kernel has.
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return None
        raise


async def _readable(file: int) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end() -> None:
        loop.remove_reader(file)
        if not ended.done():
            ended.set_result(None)

    loop.add_reader(file, end)
    try:
        await ended
    finally:
        loop.remove_reader(file)
