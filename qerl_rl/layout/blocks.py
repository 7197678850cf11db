"""Which part of a full tensor a rank holds: pure index arithmetic, no process group.

A full tensor is seen as a block whose dimensions are the things that are split: [key-value groups, heads of a group,
head_dim, hidden] of the fused attention projection, [experts, gate or up, intermediate, hidden] of the experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True)
class ParallelSizes:
    """Ranks along each dimension of the training layout."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    layers_per_stage: tuple[int, ...] = ()
    """Of each pipeline stage; none where all have equally many."""

    def first_layers(self, layers: int) -> list[int]:
        """The first layer of each pipeline stage of a model with so many."""
        counts = self.layers_per_stage or (layers // self.pipeline,) * self.pipeline
        return [0, *accumulate(counts)][:-1]


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in the training layout; `rank` is the global one."""

    rank: int
    tensor: int
    pipeline: int
    data: int
    expert: int
    expert_tensor: int
    expert_data: int


@dataclass(frozen=True)
class Block:
    """The full shape of a tensor and how it is split.

    split_dim is cut over the tensor-parallel ranks, or over the expert-tensor-parallel ranks when is_expert, and then
    dimension 0 is cut over the expert-parallel ranks.
    """

    shape: tuple[int, ...]
    split_dim: int | None = None
    is_expert: bool = False

    def part(self, sizes: ParallelSizes, at: Coordinates) -> tuple[slice, ...]:
        """The index of the part that the rank at these coordinates holds."""
        index = [slice(0, length) for length in self.shape]
        if self.split_dim is not None:
            ways, position = (sizes.expert_tensor, at.expert_tensor) if self.is_expert else (sizes.tensor, at.tensor)
            index[self.split_dim] = _share(self.shape[self.split_dim], ways, position)
        if self.is_expert:
            index[0] = _share(self.shape[0], sizes.expert, at.expert)
        return tuple(index)

    def part_shape(self, sizes: ParallelSizes, at: Coordinates) -> tuple[int, ...]:
        """Shape of the part that the rank at these coordinates holds."""
        return tuple(index.stop - index.start for index in self.part(sizes, at))

    def take(self, full: torch.Tensor, sizes: ParallelSizes, at: Coordinates) -> torch.Tensor:
        """The rank's part (a view) of the full tensor, which may have any shape with the block's number of elements."""
        return full.reshape(self.shape)[self.part(sizes, at)]

    def is_replica(self, at: Coordinates) -> bool:
        """Whether a rank with smaller coordinates, on the same pipeline stage, holds the same part."""
        if self.is_expert:
            return at.expert_data > 0 or (self.split_dim is None and at.expert_tensor > 0)
        return at.data > 0 or (self.split_dim is None and at.tensor > 0)


def _share(length: int, ways: int, position: int) -> slice:
    if length % ways:
        raise ValueError(f"{length} can't be split into {ways} equal parts")
    size = length // ways
    return slice(position * size, (position + 1) * size)
