"""What leaves memory and returns: storages, whole or part by part, and the books of which bytes are where."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch

from qerl_rl.platform.host_pages import drop_pages


class Part:
    """Bytes `begin` <= i < `end` of a storage, which a store keeps under a slot of their own.

    kept: the store has them. away: nothing may use them, since they have left or are leaving. gone: they have left.
    """

    def __init__(self, piece: Piece, begin: int, end: int, slot: int) -> None:
        self.piece, self.begin, self.end, self.slot = piece, begin, end, slot
        self.kept = self.away = self.gone = False

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    def data(self) -> torch.Tensor:
        """uint8 [bytes], in place."""
        storage = self.piece.storage
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[self.begin : self.end]

    @property
    def is_written(self) -> bool:
        """Whether leaving means that the store must have it: gradients come back as zeros."""
        return self.piece.kind != "gradients" and not (self.piece.frozen and self.kept)


class Piece:
    """One storage, however many tensors view it. away: all of it leaves, or has left, whichever parts were first."""

    def __init__(self, kind: str, storage: torch.UntypedStorage, frozen: bool, slot: Callable[[], int]) -> None:
        self.kind, self.storage, self.frozen, self._slot = kind, storage, frozen, slot
        self.bytes = storage.nbytes()
        self.away = False
        self.parts: list[Part] = []
        self.cut([])

    def cut(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let each of these views be a part, and so each gap between them. All of it must be in memory."""
        spans = sorted({span_of(tensor) for tensor in tensors})
        edges = sorted({0, self.bytes, *(edge for span in spans for edge in span)})
        self.parts = [Part(self, begin, end, self._slot()) for begin, end in pairwise(edges)]
        self._numbers = {(part.begin, part.end): number for number, part in enumerate(self.parts)}

    @property
    def is_touched(self) -> bool:
        """Whether any of it is away."""
        return any(part.away for part in self.parts)

    def part_of(self, tensor: torch.Tensor) -> Part | None:
        """The part that has the bytes of `tensor`, and no others."""
        number = self._numbers.get(span_of(tensor)) if tensor.is_contiguous() else None
        return None if number is None else self.parts[number]

    def free(self, part: Part) -> bool:
        """Let go of the memory of a part that nobody needs. Returns whether the whole storage went with it."""
        part.gone = True
        if all(other.gone for other in self.parts):
            self.storage.resize_(0)
            return True
        self._drop_pages(part)
        return False

    def _drop_pages(self, part: Part) -> None:
        """A page leaves with the last part on it; those at both ends may have begun, or may end, in others."""
        base, number = self.storage.data_ptr(), self._numbers[part.begin, part.end]
        begin, end = base + part.begin, base + part.end
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        last = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        for before in reversed(self.parts[:number]):
            if begin == first or not before.gone:
                break
            begin = max(base + before.begin, first)
        for behind in self.parts[number + 1 :]:
            if end == last or not behind.gone:
                break
            end = min(base + behind.end, last)
        drop_pages(begin, end - begin)


def span_of(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte in its storage, and the one behind its last, of a contiguous tensor; also while that is away."""
    begin = tensor.storage_offset() * tensor.element_size()
    return begin, begin + tensor.numel() * tensor.element_size()
