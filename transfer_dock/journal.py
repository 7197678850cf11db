"""An append-only file of transitions: what the controller was told, in order, whatever kills it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transfer_dock import wire
from transfer_dock.errors import DockError

Record = tuple[str, list[Any]]
"""(kind, arguments)"""

_HEAD = struct.Struct("<II")


class Journal:
    """Records [u32 length][u32 crc32][packed (kind, arguments)], little-endian, one after the other.

    A record is in the page cache when `append` returns: it survives the death of the process, not that of the machine
    (the payload in shared memory doesn't either). One process writes, one thread at a time; `Journal.read` comes before
    the first append to a file that was there, because it cuts off what a killed writer left half done.

    Raises: OSError when the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = self._open()
        self._size = os.fstat(self._file).st_size

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self._size

    def append(self, kind: str, args: Sequence[Any]) -> None:
        """Write one record behind the last one.

        Raises: TypeError for arguments that `wire.pack` refuses; DockError when the file system does (full, file too
        large): the journal is then as it was before.
        """
        record = _record(kind, args)
        try:
            _write_all(self._file, record)
        except OSError as error:
            # A part of a record in the middle of the file would make all later ones unreadable.
            os.ftruncate(self._file, self._size)
            raise DockError(f"{self.path}: {len(record)} bytes could not be written: {error.strerror}") from error
        self._size += len(record)

    def rewrite(self, records: Iterable[tuple[str, Sequence[Any]]]) -> None:
        """Put `records` in the place of all that was written; a process killed in here leaves the old or the new file.

        Raises: as `append`.
        """
        fresh = self.path.with_name(self.path.name + ".new")
        file = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            size = 0
            for kind, args in records:
                record = _record(kind, args)
                _write_all(file, record)
                size += len(record)
            os.fsync(file)
            os.replace(fresh, self.path)
        except BaseException as error:
            os.close(file)
            fresh.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise DockError(f"{self.path} could not be rewritten: {error.strerror}") from error
            raise
        os.close(self._file)
        self._file, self._size = file, size
        _sync_folder(self.path.parent)

    def close(self) -> None:
        """Close the file; nothing can be appended any more. May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Record]:
        """All whole records of a file that nobody appends to at this time; the start of one that was being written when
        its process died is cut off.

        Raises: OSError when the file cannot be read; DockError with the byte offset of a damaged record that others
        follow.
        """
        data = Path(path).read_bytes()
        records, position = [], 0
        while (end := _end_of_record(data, position)) is not None:
            records.append(_unpack(data, position, end, path))
            position = end
        if position < len(data):
            if _valid_record_behind(data, position):
                raise DockError(f"{path}: the record at byte {position} is damaged, and whole records follow it")
            os.truncate(path, position)
        return records


def _record(kind: str, args: Sequence[Any]) -> bytes:
    packed = wire.pack([kind, list(args)])
    if len(packed) >= 1 << 32:
        raise DockError(f"a journal record {kind!r} of {len(packed)} bytes: at most 4 GiB fit")
    return _HEAD.pack(len(packed), zlib.crc32(packed)) + packed


def _write_all(file: int, record: bytes) -> None:
    left = memoryview(record)
    while left:
        left = left[os.write(file, left) :]


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _end_of_record(data: bytes, position: int) -> int | None:
    """Where the record at `position` ends, or None when there is no whole, undamaged one."""
    begin = position + _HEAD.size
    if begin > len(data):
        return None
    length, checksum = _HEAD.unpack_from(data, position)
    whole = data[begin : begin + length]
    if len(whole) < length or not whole.startswith(wire.MAGIC) or zlib.crc32(whole) != checksum:
        return None
    return begin + length


def _valid_record_behind(data: bytes, position: int) -> bool:
    """Is there a whole record anywhere behind the damaged one? Its length cannot be trusted to say where."""
    found = data.find(wire.MAGIC, position + 1 + _HEAD.size)
    while found >= 0:
        if _end_of_record(data, found - _HEAD.size) is not None:
            return True
        found = data.find(wire.MAGIC, found + 1)
    return False


def _unpack(data: bytes, position: int, end: int, path: str | os.PathLike[str]) -> Record:
    try:
        # A copy of its own: an array in the arguments must not keep the whole file in memory.
        kind, args = wire.unpack(data[position + _HEAD.size : end])
    except ValueError as error:
        raise DockError(f"{path}: the record at byte {position} is not one of a journal: {error}") from error
    return kind, args
