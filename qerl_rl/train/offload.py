"""Train state leaves memory while the other engine has the card, and comes back bit for bit."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterable
from typing import Protocol

import torch

KINDS = ("parameters", "gradients", "optimizer")


class StateStore(Protocol):
    """Where bytes stay meanwhile: a file here; on a card it would be pinned host memory."""

    def write(self, slot: int, data: torch.Tensor) -> None:
        """Keep uint8 [n] `data` under `slot`; a slot always gets the same n."""

    def read(self, slot: int, data: torch.Tensor) -> None:
        """Fill uint8 [n] `data` with what `slot` keeps."""


class SpillFile:
    """One unlinked file: its bytes vanish with the process, however that ends.

    On CPU there is no memory beside the host's, so the file system takes the state (`folder` should not be a tmpfs).
    Raises: OSError when the folder is missing or the disk is full.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix="train-state-")  # noqa: SIM115 - lives with the engine
        self._places: dict[int, int] = {}
        self._end = 0

    def write(self, slot: int, data: torch.Tensor) -> None:
        if slot not in self._places:
            self._places[slot] = self._end
            self._end += data.numel()
        view = _memory(data)
        place, done = self._places[slot], 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], place + done)

    def read(self, slot: int, data: torch.Tensor) -> None:
        view = _memory(data)
        place, done = self._places[slot], 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], place + done)
            if count == 0:
                raise OSError(f"the spill file ended {len(view) - done} bytes early")
            done += count


def _memory(data: torch.Tensor) -> memoryview:
    # Tensor.numpy() would mark the storage as not resizable for good.
    return memoryview((ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())).cast("B")


class _Piece:
    """One storage, however many tensors view it."""

    def __init__(self, storage: torch.UntypedStorage, slot: int, frozen: bool) -> None:
        self.storage, self.slot, self.frozen = storage, slot, frozen
        self.bytes = storage.nbytes()
        self.kept = False
        self.away = False

    def data(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8).set_(self.storage)


class Offloader:
    """Moves storages out of memory and back by kind; every tensor on them stays the object it was.

    Frozen storages are written the first time only. Gradients are not written at all: they come back as zeros.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._pieces: dict[str, dict[int, _Piece]] = {kind: {} for kind in KINDS}
        self._slots = 0

    def track(self, kind: str, tensors: Iterable[torch.Tensor], *, frozen: bool = False) -> None:
        """Take the storages of `tensors` under `kind`, unless one is tracked already (under any kind).

        Scalars stay in memory. Raises: ValueError for a storage that can't shrink: of a mapped file, or seen by numpy.
        """
        known = {key for pieces in self._pieces.values() for key in pieces}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # The pointer to the storage object: its data pointer changes when it leaves and returns.
            key = storage._cdata
            if key in known or tensor.dim() == 0:
                continue
            _check_resizable(kind, storage)
            self._pieces[kind][key] = _Piece(storage, self._slots, frozen)
            self._slots += 1
            known.add(key)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let go of the storages of `tensors`, which nobody needs any more; some may never have been tracked."""
        for tensor in tensors:
            for pieces in self._pieces.values():
                pieces.pop(tensor.untyped_storage()._cdata, None)

    def offload(self, kinds: Iterable[str]) -> dict[str, int]:
        """Free the storages of `kinds`. Returns the bytes that left memory, by kind."""
        freed = dict.fromkeys(KINDS, 0)
        for kind in kinds:
            for piece in self._pieces[kind].values():
                if piece.away:
                    continue
                if kind != "gradients" and not (piece.frozen and piece.kept):
                    self._store.write(piece.slot, piece.data())
                    piece.kept = True
                _check_resizable(kind, piece.storage)
                piece.storage.resize_(0)
                piece.away = True
                freed[kind] += piece.bytes
        _return_free_memory()
        return freed

    def onload(self) -> dict[str, int]:
        """Bring back all that is away. Returns the bytes that came back, by kind."""
        returned = dict.fromkeys(KINDS, 0)
        for kind, pieces in self._pieces.items():
            for piece in pieces.values():
                if not piece.away:
                    continue
                piece.storage.resize_(piece.bytes)
                if kind == "gradients":
                    piece.data().zero_()
                else:
                    self._store.read(piece.slot, piece.data())
                piece.away = False
                returned[kind] += piece.bytes
        return returned

    @property
    def is_away(self) -> bool:
        """Whether anything is out of memory."""
        return any(piece.away for pieces in self._pieces.values() for piece in pieces.values())

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory now, by kind."""
        return {
            kind: sum(piece.bytes for piece in pieces.values() if not piece.away)
            for kind, pieces in self._pieces.items()
        }


def _check_resizable(kind: str, storage: torch.UntypedStorage) -> None:
    if not storage.resizable():
        raise ValueError(
            f"a {kind} storage of {storage.nbytes()} bytes can't leave memory: it is mapped from a file, shared, or "
            "Tensor.numpy() was called on it"
        )


def _return_free_memory() -> None:
    """glibc keeps freed blocks below its mmap threshold (it grows to 32 MiB) until asked; other libcs lack the call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
