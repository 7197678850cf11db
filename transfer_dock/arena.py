"""This process's view of the shared memory of one node, and the kernel locks that say which bytes somebody looks at."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import stat
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from transfer_dock.errors import DockError, DockTimeout, PayloadLost
from transfer_dock.locks import EXCLUSIVE, NONE, SHARED, Readers, reopen, try_lock

SHARED_MEMORY = "/dev/shm"
PATTERN = "transfer-dock-*.arena"
"""Names of arena files that `sweep` may remove."""

_LIVENESS_BYTE = 1 << 62
_POPULATE_READ, _POPULATE_WRITE = 22, 23
_READABLE, _WRITABLE = 1, 2
# Measured: 9 instead of 8 GB/s for the first read of 300 MB, nothing won at 16 MB (the kernel maps 16 pages a fault).
_POPULATE_READ_FROM = 32 << 20
# What one call populates: between two calls, what another thread has populated meanwhile is seen and left out.
_POPULATE_BYTES = 16 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Pin:
    """One extent that nobody can overwrite as long as this object or any view of it lives. Made by `Arena.pin`."""

    def __init__(self, arena: Arena, readers: Readers, extent: int, size: int) -> None:
        self.extent, self.size = extent, size
        self._arena, self._readers = arena, readers
        _when_garbage(self, readers.release, extent, size)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """[nbytes] uint8, read-only, the shared memory itself: `offset` counts from the beginning of the arena.

        What is derived without a copy (slices, other dtypes, torch tensors) holds the extent too.
        Raises: ValueError when the range is not inside the extent; DockError after `Arena.close`.
        """
        if nbytes < 0 or not self.extent <= offset <= offset + nbytes <= self.extent + self.size:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not all in {self!r}")
        view = self._arena._read_only(offset, nbytes)
        self._readers.again(self.extent, self.size)
        _when_garbage(view, self._readers.release, self.extent, self.size)
        return view

    def __repr__(self) -> str:
        return f"Pin(bytes {self.extent} to {self.extent + self.size} of {self._arena.path})"


class Arena:
    """The payload memory of one node, mapped whole into this process.

    A process that has it open holds a shared lock on a byte far behind the end, by which `sweep` knows that it lives.
    All locks belong to open files, so the kernel drops them with the process, however it dies. A forked child shares
    them with its parent: extents stay pinned until both let go, and what the child drops alone is not let go of; to
    read or write, the child opens the arena anew. Threads may share an Arena; it cannot be pickled.

    Args: path of an arena that `Arena.create` made.
    Raises: PayloadLost when there is none (any more); DockError when it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        file = _open_living(self.path)
        self.size = os.fstat(file).st_size
        self.bytes_written = 0
        self._process = os.getpid()
        self._readers = Readers(file)
        # Not the readers' description: a process must not overwrite what it reads itself.
        self._writer = reopen(file)
        self._mutex = threading.Lock()
        self._writing: set[tuple[int, int]] = set()
        self._levels = np.zeros(-(-self.size // mmap.PAGESIZE), np.uint8)
        mapping = mmap.mmap(file, self.size)
        self._bytes: np.ndarray | None = np.frombuffer(mapping, np.uint8)
        # numpy lets no one make an array over this writable again, as it would over the mapping itself.
        self._shown: memoryview | None = memoryview(mapping).toreadonly()
        self._close_files = _when_garbage(self, _close_files, self._process, self._readers, self._writer)

    @classmethod
    def create(cls, path: str | os.PathLike[str], size: int) -> Arena:
        """Make an arena of `size` bytes, which takes no memory before it is written.

        Raises: FileExistsError when there is one; FileNotFoundError without the folder; ValueError for no bytes.
        """
        path = Path(path)
        if size < 1:
            raise ValueError(f"an arena of {size} bytes")
        while True:
            file, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".new", dir=path.parent)
            try:
                os.truncate(file, size)
                # Nobody can sweep a file that appears with its lock held; this one before the lock they can: again.
                if try_lock(file, SHARED, _LIVENESS_BYTE, 1):
                    with suppress(FileNotFoundError):
                        os.link(temporary, path)
                        return cls(path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                os.close(file)

    def write(self, extent: int, size: int, pieces: Iterable[tuple[int, np.ndarray]], valid_until: float) -> bool:
        """Copy each array to its byte offset (from the beginning of the arena) while holding the extent alone.

        Args: pieces inside [extent, extent + size); valid_until on the clock of time.monotonic().
        Returns: False, with nothing written, when anybody reads or writes any byte of the extent.
        Raises: DockTimeout past `valid_until`; DockError when the file system is full; ValueError for a piece outside;
        TypeError for an array of objects.
        """
        pieces = list(pieces)
        self._check_range(extent, size)
        for offset, array in pieces:
            if array.dtype.hasobject:
                raise TypeError(f"an array of {array.dtype} has no bytes to share")
            if not extent <= offset <= offset + array.nbytes <= extent + size:
                raise ValueError(f"a piece from {offset} to {offset + array.nbytes} in an extent from {extent}, {size}")
        memory = self._memory()
        with self._alone(extent, size) as alone:
            if not alone:
                return False
            # Under the lock: whoever is given these bytes next finds them busy until this is through.
            if time.monotonic() > valid_until:
                raise DockTimeout(f"the extent at {extent} of {self.path} was not written within its reservation")
            copied = self._copy(memory, pieces)
        with self._mutex:
            self.bytes_written += copied
        return True

    def pin(self, extent: int, size: int) -> Pin:
        """Keep writers off an extent while the Pin or a view of it lives. Several pins of one extent share a lock.

        Raises: PayloadLost when a writer holds it, which means that its old bytes are gone.
        """
        self._check_range(extent, size)
        self._memory()
        if not self._readers.pin(extent, size):
            raise PayloadLost(f"bytes {extent} to {extent + size} of {self.path} are being overwritten")
        return Pin(self, self._readers, extent, size)

    def prefault(self, offset: int, nbytes: int) -> None:
        """Have the memory of a range given out and mapped, without changing it; for a thread in the background.

        Raises: DockError when the file system is full.
        """
        self._check_range(offset, nbytes)
        self._populate(self._memory(), offset, nbytes, _WRITABLE)

    def close(self) -> None:
        """Let go of the file; views that are alive keep their memory and their locks. May be called twice.

        No other thread may be writing.
        """
        self._bytes = self._shown = None
        self._close_files()

    def __reduce__(self) -> str:
        raise TypeError(f"an Arena belongs to its process: send the path and open it there ({self.path})")

    def __repr__(self) -> str:
        return f"Arena({str(self.path)!r}, {self.size} bytes)"

    def _check_range(self, offset: int, nbytes: int) -> None:
        if nbytes < 1 or offset < 0 or offset + nbytes > self.size:
            raise ValueError(f"no bytes {offset} to {offset + nbytes} in {self!r}")

    def _memory(self) -> np.ndarray:
        memory = self._bytes
        if memory is None:
            raise DockError(f"{self.path} was closed in this process")
        if os.getpid() != self._process:
            raise DockError(f"{self.path} was opened before a fork: open it in this process")
        return memory

    @contextmanager
    def _alone(self, extent: int, size: int) -> Iterator[bool]:
        """Hold an extent against all other processes, and all threads of this one."""
        with self._mutex:
            alone = not any(extent < start + length and start < extent + size for start, length in self._writing)
            alone = alone and try_lock(self._writer, EXCLUSIVE, extent, size)
            if alone:
                self._writing.add((extent, size))
        try:
            yield alone
        finally:
            if alone:
                with self._mutex:
                    self._writing.remove((extent, size))
                    try_lock(self._writer, NONE, extent, size)

    def _copy(self, memory: np.ndarray, pieces: list[tuple[int, np.ndarray]]) -> int:
        """The bytes of all pieces, to their places."""
        ends = [(offset, offset + array.nbytes) for offset, array in pieces if array.nbytes]
        if not ends:
            return 0
        first = min(begin for begin, _ in ends)
        self._populate(memory, first, max(end for _, end in ends) - first, _WRITABLE)
        for offset, array in pieces:
            target = memory[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)
            np.copyto(target, array, casting="no")
        return sum(end - begin for begin, end in ends)

    def _read_only(self, offset: int, nbytes: int) -> np.ndarray:
        """A new array each time; its base is no array, so that arrays derived from it go by this one, not round it."""
        memory, shown = self._memory(), self._shown
        assert shown is not None
        if nbytes >= _POPULATE_READ_FROM:
            self._populate(memory, offset, nbytes, _READABLE)
        return np.frombuffer(shown[offset : offset + nbytes], np.uint8)

    # ---- populating ----------------------------------------------------------------------------------------------
    def _populate(self, memory: np.ndarray, offset: int, nbytes: int, level: int) -> None:
        """Map what this process has not touched yet: faster than page by page, and an error instead of SIGBUS."""
        page, end = offset // mmap.PAGESIZE, -(-(offset + nbytes) // mmap.PAGESIZE)
        step = _POPULATE_BYTES // mmap.PAGESIZE
        for first in range(page, end, step):
            levels = self._levels[first : min(first + step, end)]
            missing = np.flatnonzero(levels < level)
            if len(missing):
                begin, behind = first + int(missing[0]), first + int(missing[-1]) + 1
                self._populate_pages(memory, begin * mmap.PAGESIZE, behind * mmap.PAGESIZE, level)
                np.maximum(levels, level, out=levels)

    def _populate_pages(self, memory: np.ndarray, begin: int, end: int, level: int) -> None:
        advice = _POPULATE_WRITE if level == _WRITABLE else _POPULATE_READ
        address, end = memory.ctypes.data + begin, min(end, self.size)
        for attempt in range(2):
            if not _libc.madvise(address, end - begin, advice):
                return
            failed = ctypes.get_errno()
            if failed != errno.EINVAL and attempt:
                raise self._no_memory(failed, begin, end)
            try:
                # Says why (madvise only says EFAULT), and is all that can be done before Linux 5.14 (EINVAL).
                os.posix_fallocate(self._writer, begin, end - begin)
            except OSError as error:
                raise self._no_memory(error.errno or failed, begin, end) from error
            if failed == errno.EINVAL:
                return

    def _no_memory(self, number: int, begin: int, end: int) -> DockError:
        free = shutil.disk_usage(self.path.parent).free
        return DockError(
            f"[{errno.errorcode.get(number, number)}] {os.strerror(number)}: bytes {begin} to {end} of {self.path} got "
            f"no memory; {self.path.parent} has {free} bytes free. Make it larger (mount -o remount,size=..., in a "
            "container --shm-size), delete what does not belong there, or create the dock with a smaller capacity_bytes"
        )


def _when_garbage(owner: Any, function: Callable[..., None], *args: Any) -> weakref.finalize:
    finalizer = weakref.finalize(owner, function, *args)
    # At the end of the process the kernel does it, and the views may still be in use.
    finalizer.atexit = False
    return finalizer


def _close_files(process: int, readers: Readers, writer: int) -> None:
    # A fork may have copied a mutex that nobody will give back.
    if os.getpid() == process:
        os.close(writer)
        readers.close()


def _open_living(path: Path) -> int:
    """Open an arena and hold its liveness lock, or find that it is not there any more."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise PayloadLost(f"there is no arena {path} on this node (any more)") from None
    except OSError as error:
        raise DockError(f"{path} could not be opened: {error.strerror}") from error
    if try_lock(file, SHARED, _LIVENESS_BYTE, 1) and os.fstat(file).st_nlink:
        return file
    os.close(file)
    raise PayloadLost(f"{path} is being removed: nobody had it open")


def arena_folder(nbytes: int) -> str:
    """Where an arena of `nbytes` should lie: shared memory, or with a warning the folder of temporary files."""
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    if free >= nbytes:
        return SHARED_MEMORY
    folder = tempfile.gettempdir()
    warnings.warn(
        f"{SHARED_MEMORY} has {free} bytes free, the dock wants {nbytes}: its payload goes to {folder}, which is "
        "slower. Make it larger (mount -o remount,size=..., in a container --shm-size) or lower capacity_bytes",
        RuntimeWarning,
        stacklevel=2,
    )
    return folder


def sweep(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the arenas of this user, and the journals beside them, that no process has open any more.

    Returns: what was removed. A file that cannot be opened or removed is left to its owner.
    """
    removed: list[Path] = []
    for pattern in (PATTERN, f"{PATTERN}.*.new"):
        for path in sorted(Path(folder).glob(pattern)):
            with suppress(OSError):
                removed += _remove_when_dead(path)
    return removed


def _remove_when_dead(path: Path) -> list[Path]:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return []
        # The name is checked under the lock: it may be another, living arena by now.
        if not try_lock(file, EXCLUSIVE, _LIVENESS_BYTE, 1) or not os.path.samestat(found, os.lstat(path)):
            return []
        journal = path.with_suffix(".journal")
        # The arena last: a sweep that is killed between two leaves the one that the next sweep finds.
        removed = [path]
        for other in (journal.with_name(journal.name + ".new"), journal) if path.suffix == ".arena" else ():
            if other.exists():
                other.unlink()
                removed.append(other)
        path.unlink()
        return removed
    finally:
        os.close(file)
