"""Train state leaves memory while the other engine has the card, and comes back bit for bit."""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from qerl_rl.platform.device import Pending
from qerl_rl.platform.host_pages import is_host_memory
from qerl_rl.platform.state_store import StateStore
from qerl_rl.train.pieces import Part, Piece

KINDS = ("parameters", "gradients", "optimizer")
BATCH_BYTES = 1 << 24
"""Copied before the next memory is freed; one copy at a time of thousands of small storages would take longer."""
EARLY_BYTES = 2 * BATCH_BYTES
"""Most bytes that leave early and wait for the store: what is slow there must not fill memory."""


@dataclass(frozen=True)
class _Move:
    """Parts that are being copied. is_early: they leave ahead of their storage."""

    parts: list[Part]
    pending: Pending
    is_early: bool = False


class Offloader:
    """Moves storages out of memory and back by kind; every tensor on them stays the object it was.

    Frozen storages are written the first time only. Gradients are not written at all: they come back as zeros. All
    copies are begun before the first is waited for, so that a store keeps its stream busy.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._pieces: dict[int, Piece] = {}
        self._slots = itertools.count()
        self._leaving: deque[_Move] = deque()
        self._returning: deque[_Move] = deque()
        self._may_trim = False

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
            self._pieces[key] = Piece(kind, storage, frozen, self._slots.__next__)

    def divide(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let `tensors` leave one by one (`leave_early`) although they share storages, which are tracked.

        That takes memory of the host: the allocator of a card can't free a part of a block, so there nothing happens.
        They must be contiguous and must not overlap. Call it once, with everything in memory.
        """
        views: dict[Piece, list[torch.Tensor]] = {}
        for tensor in tensors:
            piece = self._piece_of(tensor)
            if piece is not None and is_host_memory(piece.storage):
                views.setdefault(piece, []).append(tensor)
        for piece, tensors_of_piece in views.items():
            piece.cut(tensors_of_piece)

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let go of the storages of `tensors`, which nobody needs any more; some may never have been tracked."""
        self.finish()
        for tensor in tensors:
            self._pieces.pop(tensor.untyped_storage()._cdata, None)

    def _of(self, kind: str) -> Iterator[Piece]:
        return (piece for piece in self._pieces.values() if piece.kind == kind)

    def _piece_of(self, tensor: torch.Tensor) -> Piece | None:
        return self._pieces.get(tensor.untyped_storage()._cdata)

    # ---- out

    def begin_offload(self, kinds: Iterable[str], *, only_frozen: Iterable[str] = ()) -> dict[str, int]:
        """Let the storages of `kinds` leave; those that must be written first stay until `reclaim` or `finish`.

        only_frozen: kinds of which what trains stays. What leaves may be read until it is gone, and not be changed.
        Returns the bytes that leave, by kind; what has left early counts when its storage leaves.
        """
        self.finish()
        freed, partly, leaving = dict.fromkeys(KINDS, 0), set(only_frozen), []
        for kind in kinds:
            for piece in self._of(kind):
                if piece.away or (kind in partly and not piece.frozen):
                    continue
                _check_resizable(kind, piece.storage)
                piece.away = True
                freed[kind] += piece.bytes
                leaving += [part for part in piece.parts if not part.away]
        # Also what others have freed.
        self._may_trim = True
        self._let_go(leaving)
        return freed

    def leave_early(self, tensor: torch.Tensor) -> int:
        """Let one tensor leave ahead of its kind, if it has a storage of its own or `divide` knew it; else nothing.

        Nobody may read it any more until `onload`. It is freed as by `begin_offload`, which later takes the rest; what
        waits for the store is at most EARLY_BYTES and this tensor: from there on the call waits too.
        Returns the bytes that leave. Raises: what goes wrong with copies, such as a full disk.
        """
        piece = self._piece_of(tensor)
        part = piece.part_of(tensor) if piece is not None else None
        if piece is None or part is None or part.away:
            return 0
        _check_resizable(piece.kind, piece.storage)
        while self._early_bytes() > EARLY_BYTES:
            self._free_first()
        self._let_go([part], is_early=True)
        self.reclaim()
        return part.bytes

    def _early_bytes(self) -> int:
        return sum(part.bytes for move in self._leaving if move.is_early for part in move.parts)

    def _let_go(self, parts: Iterable[Part], *, is_early: bool = False) -> None:
        later = []
        for part in parts:
            part.away = True
            if part.is_written:
                later.append(part)
            else:
                self._free(part)
        for batch in _batches(later):
            written = self._store.begin_write({part.slot: part.data() for part in batch})
            self._leaving.append(_Move(batch, written, is_early))
        self._trim()

    def reclaim(self) -> None:
        """Free what has been written by now."""
        while self._leaving and self._leaving[0].pending.done():
            self._free_first()

    def offload(self, kinds: Iterable[str]) -> dict[str, int]:
        """Free the storages of `kinds`. Returns the bytes that left memory, by kind, with those that left early."""
        freed = self.begin_offload(kinds)
        self.finish()
        return freed

    def _free_first(self) -> None:
        move = self._leaving[0]
        move.pending.result()
        self._leaving.popleft()
        for part in move.parts:
            part.kept = True
            self._free(part)
        self._trim()

    def _free(self, part: Part) -> None:
        self._may_trim |= part.piece.free(part)

    def _trim(self) -> None:
        # It takes long: once for all that leave together, and not where pages have gone back already.
        if self._may_trim and not self._leaving:
            _return_free_memory()
            self._may_trim = False

    # ---- back

    def onload(self) -> dict[str, int]:
        """Bring back all that is away: parameters and gradients now, the optimizer's by `finish`.

        Returns the bytes that come back, by kind.
        """
        self.finish()
        returned = dict.fromkeys(KINDS, 0)
        # Passes need the parameters, updates the rest as well.
        for kind in ("parameters", "optimizer", "gradients"):
            parts = [part for piece in self._of(kind) for part in self._place(piece)]
            returned[kind] = sum(part.bytes for part in parts)
            if kind == "gradients":
                for part in parts:
                    part.data().zero_()
                continue
            for batch in _batches(parts):
                read = self._store.begin_read({part.slot: part.data() for part in batch})
                self._returning.append(_Move(batch, read))
        while self._returning and self._returning[0].parts[0].piece.kind == "parameters":
            self._returning.popleft().pending.result()
        return returned

    def _place(self, piece: Piece) -> list[Part]:
        """Make room for what of it is away, and say what that is."""
        parts = [part for part in piece.parts if part.away]
        if piece.storage.nbytes() != piece.bytes:
            piece.storage.resize_(piece.bytes)
        for part in parts:
            part.away = part.gone = False
        piece.away = False
        return parts

    # ---- both

    def finish(self) -> None:
        """Until all that leaves has left and all that returns is back. Raises: what went wrong, such as a full disk."""
        while self._leaving:
            self._free_first()
        while self._returning:
            self._returning.popleft().pending.result()

    @property
    def is_away(self) -> bool:
        """Whether anything is out of memory, or leaves it."""
        return any(piece.is_touched for piece in self._pieces.values())

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether nothing of the storages of `tensors` is out of memory, or leaves it."""
        pieces = (self._piece_of(tensor) for tensor in tensors)
        return not any(piece.is_touched for piece in pieces if piece is not None)

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory now, by kind."""
        held = dict.fromkeys(KINDS, 0)
        for piece in self._pieces.values():
            held[piece.kind] += sum(part.bytes for part in piece.parts if not part.gone)
        return held


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """The parts in order, about BATCH_BYTES at a time."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += part.bytes
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
