"""Kernel locks on byte ranges: who looks at which bytes of a file. They die with their process, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from transfer_dock.errors import DockError

SHARED, EXCLUSIVE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK

_LOCK = struct.Struct("hhqqi4x")


def reopen(file: int) -> int:
    """The same file through another description, whose locks conflict with those of `file`."""
    return os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_CLOEXEC)


def try_lock(file: int, kind: int, start: int, length: int) -> bool:
    """An open-file-description lock, never waited for: False when another description holds a conflicting one."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


class Readers:
    """Shared locks of this process, counted by extent, and the file description that holds them."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._process = os.getpid()
        self._mutex = threading.Lock()
        # (extent, size) -> [count, file description]
        self._held: dict[tuple[int, int], list[int]] = {}
        # Those locked through `file`, sorted; they never overlap (see pin).
        self._joint: list[tuple[int, int]] = []
        self._released: deque[tuple[int, int]] = deque()
        self._closing = False

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            with self._mutex:
                yield
        finally:
            self._drain()

    def pin(self, extent: int, size: int) -> bool:
        """Count one more; False when a writer holds any byte of the extent."""
        with self._exclusive():
            if self._closing:
                raise DockError("the arena was closed in this process")
            held = self._held.get((extent, size))
            if held is None:
                if (held := self._lock_extent(extent, size)) is None:
                    return False
                self._held[extent, size] = held
            held[0] += 1
        return True

    def _lock_extent(self, extent: int, size: int) -> list[int] | None:
        place = bisect_left(self._joint, (extent, size))
        before, behind = self._joint[max(place - 1, 0) : place], self._joint[place : place + 1]
        if any(extent < start + length and start < extent + size for start, length in before + behind):
            # One of the two is out of date, and the kernel joins the locks of one description: unlocking either
            # would unlock the bytes they share.
            file = reopen(self.file)
            if try_lock(file, SHARED, extent, size):
                return [0, file]
            os.close(file)
            return None
        if not try_lock(self.file, SHARED, extent, size):
            return None
        self._joint.insert(place, (extent, size))
        return [0, self.file]

    def again(self, extent: int, size: int) -> None:
        """Count one more of an extent that is pinned."""
        with self._exclusive():
            self._held[extent, size][0] += 1

    def release(self, extent: int, size: int) -> None:
        """Count one less. Comes from finalizers: from any place in any thread, even one that holds the mutex."""
        self._released.append((extent, size))
        self._drain()

    def close(self) -> None:
        with self._exclusive():
            self._closing = True
            self._close_when_unused()

    def _drain(self) -> None:
        # A fork shares the descriptions: what it lets go of is still looked at by its parent.
        if os.getpid() != self._process:
            return
        # Whoever holds the mutex comes here after giving it back, so that nothing stays behind.
        while self._released and self._mutex.acquire(blocking=False):
            try:
                while self._released:
                    self._release_one(self._released.popleft())
            finally:
                self._mutex.release()

    def _release_one(self, key: tuple[int, int]) -> None:
        held = self._held[key]
        held[0] -= 1
        if held[0] > 0:
            return
        del self._held[key]
        if held[1] == self.file:
            try_lock(self.file, NONE, *key)
            del self._joint[bisect_left(self._joint, key)]
        else:
            os.close(held[1])
        self._close_when_unused()

    def _close_when_unused(self) -> None:
        if self._closing and not self._held and self.file >= 0:
            os.close(self.file)
            self.file = -1
