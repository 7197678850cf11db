"""Where bytes stay that leave memory for a while: pinned host memory for a card's, an unlinked file for the host's own.

A store copies beside the caller. What it is given keeps its bytes until the copy is done.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from qerl_rl.platform.device import Device, Pending

Slots = Mapping[int, torch.Tensor]
"""uint8 [n] by slot; a slot always has the same n."""


class StateStore(Protocol):
    """Keeps bytes by slot. Copies are done in the order they were begun."""

    def begin_write(self, slots: Slots) -> Pending:
        """Begin to keep the bytes of each slot."""

    def begin_read(self, slots: Slots) -> Pending:
        """Begin to fill the tensor of each slot with what the slot keeps."""

    def write(self, slot: int, data: torch.Tensor) -> None:
        """Keep the bytes of one slot; they are copied on return."""

    def read(self, slot: int, data: torch.Tensor) -> None:
        """Fill `data` with what `slot` keeps."""


def state_store(device: Device, folder: str | None = None) -> StateStore:
    """The store for state of `device`: its own file in `folder` for the host's, pinned host memory for a card's."""
    return SpillFile(folder) if device.name == "cpu" else PinnedStore(device)


class _WaitingStore:
    """The two calls that wait."""

    def write(self: StateStore, slot: int, data: torch.Tensor) -> None:
        self.begin_write({slot: data}).result()

    def read(self: StateStore, slot: int, data: torch.Tensor) -> None:
        self.begin_read({slot: data}).result()


class SpillFile(_WaitingStore):
    """One unlinked file: its bytes vanish with the process, however that ends.

    On CPU there is no memory beside the host's, so the file system takes the state (`folder` should not be a tmpfs). A
    thread of its own copies. Raises: OSError when the folder is missing; copies raise it when the disk is full.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="train-state-")  # noqa: SIM115 - lives with the engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spill-file")
        self._places: dict[int, int] = {}
        self._end = 0

    def begin_write(self, slots: Slots) -> Pending:
        """See StateStore."""
        for slot, data in slots.items():
            if slot not in self._places:
                self._places[slot] = self._end
                self._end += data.numel()
        return self._thread.submit(self._write, slots)

    def begin_read(self, slots: Slots) -> Pending:
        """See StateStore; the copies raise KeyError for a slot that nothing was written to."""
        return self._thread.submit(self._read, slots)

    def _write(self, slots: Slots) -> None:
        for slot, data in slots.items():
            place, view, done = self._places[slot], _memory(data), 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], place + done)

    def _read(self, slots: Slots) -> None:
        for slot, data in slots.items():
            place, view, done = self._places[slot], _memory(data), 0
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], place + done)
                if count == 0:
                    raise OSError(f"the spill file ended {len(view) - done} bytes early")
                done += count


def _memory(data: torch.Tensor) -> memoryview:
    # Tensor.numpy() would mark the storage as not resizable for good.
    return memoryview((ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())).cast("B")


class PinnedStore(_WaitingStore):
    """Pinned memory of the host, taken once for each slot and used again every time.

    Slots lie one behind the other in chunks of a power of two bytes: torch rounds what it pins up to one, so that a
    block a slot would take up to twice its size.
    """

    def __init__(self, device: Device, *, chunk_bytes: int = 1 << 28) -> None:
        self._device, self._chunk_bytes = device, chunk_bytes
        self._copies = device.copy_stream()
        self._chunks: list[torch.Tensor] = []
        self._used = chunk_bytes
        self._places: dict[int, list[torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Host memory that is pinned."""
        return sum(chunk.numel() for chunk in self._chunks)

    def begin_write(self, slots: Slots) -> Pending:
        """See StateStore."""
        for slot, data in slots.items():
            if slot not in self._places:
                self._places[slot] = list(self._take(data.numel()))
        return self._copies.copy((pinned, part) for part, pinned in self._parts(slots))

    def begin_read(self, slots: Slots) -> Pending:
        """See StateStore. Raises: KeyError for a slot that nothing was written to."""
        return self._copies.copy(self._parts(slots))

    def _parts(self, slots: Slots) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(part of a slot's data, the pinned bytes it has)."""
        for slot, data in slots.items():
            places = self._places[slot]
            yield from zip(data.split([place.numel() for place in places]), places, strict=True)

    def _take(self, count: int) -> Iterator[torch.Tensor]:
        """`count` bytes behind those in use."""
        while count:
            if self._used == self._chunk_bytes:
                self._chunks.append(self._device.pinned(self._chunk_bytes))
                self._used = 0
            length = min(count, self._chunk_bytes - self._used)
            yield self._chunks[-1][self._used : self._used + length]
            self._used += length
            count -= length
