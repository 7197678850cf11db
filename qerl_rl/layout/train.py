"""What each rank of a Megatron layout holds: tensor x pipeline x expert x expert-tensor x data parallel."""

from __future__ import annotations

import math
from collections.abc import Hashable

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import Block, Coordinates, ParallelSizes
from qerl_rl.layout.holdings import Box, Holding
from qerl_rl.layout.tensors import Entry, Tensors, Weights, entries


def parallel_sizes(train: TrainConfig) -> ParallelSizes:
    """The layout of a launch file."""
    return ParallelSizes(
        train.tensor_parallel,
        train.pipeline_parallel,
        train.expert_parallel,
        train.expert_tensor_parallel,
        train.stage_layers,
    )


def coordinates(rank: int, sizes: ParallelSizes, world_size: int) -> Coordinates:
    """Where a rank stands, in the order in which Megatron deals them out (tp-cp-ep-dp-pp).

    Tensor parallel goes fastest, then data parallel; for experts expert-tensor, expert, then expert-data parallel.
    Pipeline stages go slowest, for both alike.
    """
    in_stage = world_size // sizes.pipeline
    return Coordinates(
        rank=rank,
        tensor=rank % sizes.tensor,
        pipeline=rank // in_stage,
        data=rank % in_stage // sizes.tensor,
        expert=rank // sizes.expert_tensor % sizes.expert,
        expert_tensor=rank % sizes.expert_tensor,
        expert_data=rank % in_stage // (sizes.expert * sizes.expert_tensor),
    )


class TrainLayout:
    """Layout of the trainer's model. Local names are Megatron's, those of the rank's stage.

    Raises: ConfigError where a size does not divide what it splits, or cuts through weights that share a scale.
    """

    def __init__(
        self,
        architecture: MoeArchitecture,
        sizes: ParallelSizes,
        world_size: int,
        tensors: Tensors | None = None,
    ) -> None:
        self.world_size, self.sizes, self._layers = world_size, sizes, architecture.layers
        check_world(sizes, world_size)
        check_stages(sizes, architecture.layers)
        self._coordinates = [coordinates(rank, sizes, world_size) for rank in range(world_size)]
        self._entries: dict[str, list[Entry]] = {}
        seen: set[Block] = set()
        for entry in entries(architecture, tensors or Weights(), sizes):
            self._entries.setdefault(entry.tensor.name, []).append(entry)
            if entry.slot.block not in seen:
                _check_block(entry, sizes)
                seen.add(entry.slot.block)

    def pattern(self, tensor: str) -> Hashable:
        """Equal for tensors that are spread over the ranks alike."""
        return tuple(
            (entry.slot.block, str(entry.piece and entry.piece.index), self._stage(entry))
            for entry in self._entries.get(tensor, ())
        )

    def holdings_of(self, tensor: str, rank: int) -> list[Holding]:
        """What the rank holds of one tensor."""
        at = self._coordinates[rank]
        return [
            holding
            for entry in self._entries.get(tensor, ())
            if self._stage(entry) == at.pipeline
            for holding in self._holdings(entry, at)
        ]

    def holdings(self, rank: int) -> list[Holding]:
        """All that a rank holds, in the order of the model."""
        return [holding for tensor in self._entries for holding in self.holdings_of(tensor, rank)]

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the rank's tensors, by name."""
        at = self._coordinates[rank]
        return {
            self._local(entry): _local_shape(entry, entry.slot.block.part_shape(self.sizes, at))
            for found in self._entries.values()
            for entry in found
            if self._stage(entry) == at.pipeline
        }

    def _stage(self, entry: Entry) -> int:
        return entry.slot.stage(self._layers, self.sizes)

    def _local(self, entry: Entry) -> str:
        return entry.slot.module_path(self._layers, self.sizes)

    def _holdings(self, entry: Entry, at: Coordinates) -> list[Holding]:
        tensor, local = entry.tensor.name, self._local(entry)
        part, view = entry.slot.block.part(self.sizes, at), entry.slot.block.part_shape(self.sizes, at)
        if entry.is_grouped:
            assert entry.piece is not None
            heads = len(range(entry.slot.block.shape[1])[entry.piece.index[1]])
            inner = tuple(slice(0, length) for length in (heads, *view[2:]))
            first = part[0].start
            return [
                Holding(
                    tensor,
                    Box(((first + group) * heads, *(0 for _ in view[2:])), ((first + group + 1) * heads, *view[2:])),
                    local,
                    view,
                    (group, *inner),
                )
                for group in range(view[0])
            ]
        chosen = entry.piece.index if entry.piece else ()
        index: list[int | slice] = []
        start, stop = [], []
        for dim, here in enumerate(part):
            wanted = chosen[dim] if dim < len(chosen) else slice(None)
            if isinstance(wanted, int):
                index.append(wanted)  # Gate or up, key or value: of these every rank holds its share.
                continue
            offset, end, _ = wanted.indices(entry.slot.block.shape[dim])
            first, last = max(here.start, offset), min(here.stop, end)
            if first >= last:
                return []
            index.append(slice(first - here.start, last - here.start))
            start.append(first - offset)
            stop.append(last - offset)
        return [Holding(tensor, Box(tuple(start), tuple(stop)), local, view, tuple(index))]


def _local_shape(entry: Entry, view: tuple[int, ...]) -> tuple[int, ...]:
    """Megatron's shape of a part of a block: a matrix, a stack of matrices, or a vector."""
    if entry.slot.name.endswith("bias"):
        return (math.prod(view),)
    if entry.slot.block.is_expert:
        return (view[0], math.prod(view[1:-1]), view[-1])
    return view if len(view) == 1 else (math.prod(view[:-1]), view[-1])


def check_stages(sizes: ParallelSizes, layers: int) -> None:
    """Raise ConfigError when the pipeline stages don't have the layers of the model."""
    counts, stages = sizes.layers_per_stage, sizes.pipeline
    if not counts and layers % stages:
        raise ConfigError(
            f"train.pipeline_parallel={stages} does not divide the model's {layers} layers.",
            fix=f"set train.pipeline_parallel to {_divisors(layers, stages)}, "
            "or name the layers of each stage in train.layers_per_stage",
        )
    if counts and (len(counts) != stages or sum(counts) != layers or min(counts) < 1):
        raise ConfigError(
            f"train.layers_per_stage={','.join(map(str, counts))} are not the {layers} layers of {stages} stages.",
            fix=f"give {stages} numbers above 0 that add up to {layers}",
        )


def check_world(sizes: ParallelSizes, world_size: int) -> None:
    """Raise ConfigError when the sizes don't fit the number of ranks."""
    for product, keys in (
        (sizes.tensor * sizes.pipeline, "tensor_parallel x train.pipeline_parallel"),
        (
            sizes.expert * sizes.expert_tensor * sizes.pipeline,
            "expert_parallel x train.expert_tensor_parallel x train.pipeline_parallel",
        ),
    ):
        if world_size % product:
            raise ConfigError(
                f"train.{keys} = {product} does not divide the {world_size} workers.",
                fix=f"choose sizes whose product divides {world_size}",
            )


def _check_block(entry: Entry, sizes: ParallelSizes) -> None:
    """Raise ConfigError where the sizes cut a block of this entry's kind unevenly."""
    block, splits = entry.slot.block, []
    if block.is_expert:
        splits.append((0, "expert_parallel", sizes.expert))
    if block.split_dim is not None:
        tensor = (
            ("expert_tensor_parallel", sizes.expert_tensor) if block.is_expert else ("tensor_parallel", sizes.tensor)
        )
        splits.append((block.split_dim, *tensor))
    for dim, key, ways in splits:
        if block.shape[dim] % ways:
            raise ConfigError(
                f"train.{key}={ways} does not divide dimension {dim} of {entry.tensor.name} {block.shape}.",
                fix=f"set train.{key} to {_divisors(block.shape[dim], ways)}, or quantize the model in smaller groups"
                if dim == len(block.shape) - 1
                else f"set train.{key} to {_divisors(block.shape[dim], ways)}",
            )


def _divisors(count: int, below: int) -> str:
    return " or ".join(str(size) for size in range(1, below) if count % size == 0)
