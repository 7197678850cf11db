"""Train state leaves memory while the other engine has the card, and comes back bit for bit."""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from qerl_rl.platform.device import Pending
from qerl_rl.platform.state_store import StateStore

KINDS = ("parameters", "gradients", "optimizer")
BATCH_BYTES = 1 << 24
"""Copied before the next memory is freed; one copy at a time of thousands of small storages would take longer."""


class _Piece:
    """One storage, however many tensors view it."""

    def __init__(self, kind: str, storage: torch.UntypedStorage, slot: int, frozen: bool) -> None:
        self.kind, self.storage, self.slot, self.frozen = kind, storage, slot, frozen
        self.bytes = storage.nbytes()
        self.kept = False
        self.away = False

    def data(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.storage.device).set_(self.storage)

    @property
    def is_written(self) -> bool:
        """Whether leaving means that the store must have it: gradients come back as zeros."""
        return self.kind != "gradients" and not (self.frozen and self.kept)


class Offloader:
    """Moves storages out of memory and back by kind; every tensor on them stays the object it was.

    Frozen storages are written the first time only. Gradients are not written at all: they come back as zeros. All
    copies are begun before the first is waited for, so that a store keeps its stream busy.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._pieces: dict[int, _Piece] = {}
        self._slots = itertools.count()
        self._leaving: deque[tuple[list[_Piece], Pending]] = deque()
        self._returning: deque[tuple[list[_Piece], Pending]] = deque()

    def track(self, kind: str, tensors: Iterable[torch.Tensor], *, frozen: bool = False) -> None:
        """Take the storages of `tensors` under `kind`, unless one is tracked already (under any kind).

        Scalars stay in memory. Raises: ValueError for a storage that can't shrink: of a mapped file, or seen by numpy.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # The pointer to the storage object: its data pointer changes when it leaves and returns.
            key = storage._cdata
            if key in self._pieces or tensor.dim() == 0:
                continue
            _check_resizable(kind, storage)
            self._pieces[key] = _Piece(kind, storage, next(self._slots), frozen)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let go of the storages of `tensors`, which nobody needs any more; some may never have been tracked."""
        self.finish()
        for tensor in tensors:
            self._pieces.pop(tensor.untyped_storage()._cdata, None)

    def _of(self, kind: str) -> Iterator[_Piece]:
        return (piece for piece in self._pieces.values() if piece.kind == kind)

    # ---- out

    def begin_offload(self, kinds: Iterable[str], *, only_frozen: Iterable[str] = ()) -> dict[str, int]:
        """Let the storages of `kinds` leave; those that must be written first stay until `reclaim` or `finish`.

        only_frozen: kinds of which what trains stays. What leaves may be read until it is gone, and not be changed.
        Returns the bytes that leave, by kind.
        """
        self.finish()
        freed, partly, later = dict.fromkeys(KINDS, 0), set(only_frozen), []
        for kind in kinds:
            for piece in self._of(kind):
                if piece.away or (kind in partly and not piece.frozen):
                    continue
                _check_resizable(kind, piece.storage)
                piece.away = True
                freed[kind] += piece.bytes
                if piece.is_written:
                    later.append(piece)
                else:
                    piece.storage.resize_(0)
        for batch in _batches(later):
            self._leaving.append((batch, self._store.begin_write({piece.slot: piece.data() for piece in batch})))
        if not later:
            _return_free_memory()
        return freed

    def reclaim(self) -> None:
        """Free what has been written by now."""
        while self._leaving and self._leaving[0][1].done():
            self._free_first()

    def offload(self, kinds: Iterable[str]) -> dict[str, int]:
        """Free the storages of `kinds`. Returns the bytes that left memory, by kind."""
        freed = self.begin_offload(kinds)
        self.finish()
        return freed

    def _free_first(self) -> None:
        batch, written = self._leaving[0]
        written.result()
        self._leaving.popleft()
        for piece in batch:
            piece.kept = True
            piece.storage.resize_(0)
        if not self._leaving:
            _return_free_memory()

    # ---- back

    def onload(self) -> dict[str, int]:
        """Bring back all that is away: parameters and gradients now, the optimizer's by `finish`.

        Returns the bytes that come back, by kind.
        """
        self.finish()
        returned = dict.fromkeys(KINDS, 0)
        # Passes need the parameters, updates the rest as well.
        for kind in ("parameters", "optimizer", "gradients"):
            pieces = [piece for piece in self._of(kind) if piece.away]
            for piece in pieces:
                piece.storage.resize_(piece.bytes)
                piece.away = False
            returned[kind] = sum(piece.bytes for piece in pieces)
            if kind == "gradients":
                for piece in pieces:
                    piece.data().zero_()
                continue
            for batch in _batches(pieces):
                read = self._store.begin_read({piece.slot: piece.data() for piece in batch})
                self._returning.append((batch, read))
        while self._returning and self._returning[0][0][0].kind == "parameters":
            self._returning.popleft()[1].result()
        return returned

    # ---- both

    def finish(self) -> None:
        """Until all that leaves has left and all that returns is back. Raises: what went wrong, such as a full disk."""
        while self._leaving:
            self._free_first()
        while self._returning:
            self._returning.popleft()[1].result()

    @property
    def is_away(self) -> bool:
        """Whether anything is out of memory, or leaves it."""
        return any(piece.away for piece in self._pieces.values())

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory now, by kind."""
        leaving = {id(piece) for batch, _ in self._leaving for piece in batch}
        held = dict.fromkeys(KINDS, 0)
        for piece in self._pieces.values():
            if not piece.away or id(piece) in leaving:
                held[piece.kind] += piece.bytes
        return held


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """The pieces in order, about BATCH_BYTES at a time."""
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += piece.bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
