"""A dock in one file: the payload that is still needed, then what the ledger knows."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from transfer_dock import wire
from transfer_dock.access import Access
from transfer_dock.calls import ask
from transfer_dock.columns import ColumnRead, Layout, Place
from transfer_dock.errors import DockError, InvalidRequest
from transfer_dock.records import Settings
from transfer_dock.space import Space
from transfer_dock.spaces import Spaces

# The file ends with the place and length of its last part, and this.
TRAILER = struct.Struct("<QQ8s")
MAGIC = b"tdock001"
# What is brought from another node at once; bytes.
CHUNK = 64 << 20


def save(path: str, access: Access, timeout: float) -> int:
    """Write the dock behind `access` to `path`: a temporary file, synced, then renamed. Returns the file's bytes.

    Raises: OSError; PayloadLost when a node does not give its bytes.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    pin, state = access.caller.run(ask("pin"))
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, suffix=".tmp", delete=False) as file:
            try:
                size = _write(file, state, access, timeout)
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
    finally:
        access.caller.run(ask("unpin", pin))
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


def _write(file: Any, state: Any, access: Access, timeout: float) -> int:
    used = {(node, extent) for node, extent, *_ in state["blocks"]}
    parts = []
    for node, extent, size in state["extents"]:
        if (node, extent) not in used:
            continue  # A put that is being written.
        digest, begin = xxhash.xxh3_64(), file.tell()
        for data in _chunks(Place(node, extent, size, extent, size), access, timeout):
            digest.update(data.data)
            file.write(data.data)
        parts.append([node, extent, size, begin, digest.intdigest()])
    begin = file.tell()
    header = wire.pack({"state": state, "parts": parts})
    file.write(header)
    file.write(TRAILER.pack(begin, len(header), MAGIC))
    file.flush()
    os.fsync(file.fileno())
    return file.tell()


def _chunks(place: Place, access: Access, timeout: float) -> Iterator[np.ndarray]:
    for start in range(0, place.size, CHUNK):
        length = min(CHUNK, place.size - start)
        whole = (np.zeros(1, np.int64), np.array([start], np.int64), np.array([length], np.int64))
        read = ColumnRead("uint8", Layout(True, ()), [place], *whole)
        yield access.rows(read, access.pin([read]), timeout)


def load(path: str, access: Access, settings: Settings) -> None:
    """Fill the new, empty dock behind `access` from a file; all payload goes to this process's node.

    Raises: OSError; DockError when the file is no dock or damaged; InvalidRequest when the dock was created otherwise.
    """
    arena, space = access.arena(), Space(Spaces(settings.capacity_bytes).size)
    with open(path, "rb") as file:
        header = _header(file, path)
        moved = []
        for node, extent, size, begin, digest in header["parts"]:
            offset = space.allocate(size)
            if offset is None:
                raise InvalidRequest(f"what {path} holds does not fit into capacity_bytes={settings.capacity_bytes}")
            file.seek(begin)
            data = np.frombuffer(file.read(size), np.uint8)
            if len(data) != size or xxhash.xxh3_64_intdigest(data.data) != digest:
                raise DockError(f"{path} is damaged: the {size} bytes at {begin} are not those that were written")
            arena.write(offset, size, [(offset, data)], valid_until=time.monotonic() + settings.lease_timeout)
            moved.append([node, extent, access.node, offset])
    access.caller.run(ask("restore", header["state"], moved, os.urandom(8)))


def _header(file: BinaryIO, path: str) -> dict[str, Any]:
    size = file.seek(0, os.SEEK_END)
    if size >= TRAILER.size:
        file.seek(size - TRAILER.size)
        begin, length, magic = TRAILER.unpack(file.read())
        if magic == MAGIC and begin + length + TRAILER.size == size:
            file.seek(begin)
            return wire.unpack(file.read(length))
    raise DockError(f"{path} is no saved dock, or was cut off")
