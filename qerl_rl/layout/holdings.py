"""What a rank holds of which full tensor, and where: the words that two layouts are compared in.

A full tensor is what a resharding moves: a weight of the checkpoint, or all experts' weights of a layer stacked, or one
part of its quantized form. Engines fuse and split them each in its own way; both say what they hold as boxes of these.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch


@dataclass(frozen=True)
class FullTensor:
    """A tensor as nobody holds it: its shape, the type that it travels in, its layer (-1 before, `layers` behind)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: int
    is_expert: bool = False


@dataclass(frozen=True)
class Box:
    """The elements start[d] <= i < stop[d] along each dimension d."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Box:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), shape)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """As an index of the full tensor."""
        return tuple(map(slice, self.start, self.stop))

    def meet(self, other: Box) -> Box | None:
        """What both have; None where that is nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(map(int.__lt__, start, stop)) else None


@dataclass(frozen=True)
class Holding:
    """A box of a full tensor in a tensor of one rank.

    local: the rank's tensor, by the name that its engine gives it. view: the shape to view it as; index: into that
    view, numbers and slices with both ends; it leaves the dimensions of the box.
    """

    tensor: str
    box: Box
    local: str
    view: tuple[int, ...]
    index: tuple[int | slice, ...]

    def take(self, local: torch.Tensor) -> torch.Tensor:
        """The box (a view) out of the rank's tensor."""
        count, shape, strides, offset = self._place
        if local.is_contiguous() and local.numel() == count:
            # One operation and not two: a swap of small tensors takes as long as its Python.
            return local.as_strided(shape, strides, local.storage_offset() + offset)
        return local.view(self.view)[self.index]

    @cached_property
    def _place(self) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
        """Elements of the rank's tensor; the box in it where it is contiguous: shape, strides, first element."""
        box = torch.empty(self.view, device="meta")[self.index]
        return math.prod(self.view), tuple(box.shape), box.stride(), int(box.storage_offset())

    def narrowed(self, box: Box) -> Holding:
        """The same for a box within this one's."""
        index: list[int | slice] = []
        dim = 0
        for each in self.index:
            if isinstance(each, slice):
                first = each.start - self.box.start[dim]
                each = slice(first + box.start[dim], first + box.stop[dim])
                dim += 1
            index.append(each)
        return Holding(self.tensor, box, self.local, self.view, tuple(index))


class Layout(Protocol):
    """How one engine spreads a model over `world_size` ranks."""

    @property
    def world_size(self) -> int:
        """Ranks; what several hold is the same."""

    def pattern(self, tensor: str) -> Hashable:
        """Equal for full tensors of one shape that are spread alike: the same boxes on the same ranks."""

    def holdings_of(self, tensor: str, rank: int) -> list[Holding]:
        """What a rank holds of one full tensor; no element twice."""

    def holdings(self, rank: int) -> list[Holding]:
        """All that a rank holds, in the order of the model's layers."""

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the rank's tensors, by name."""
