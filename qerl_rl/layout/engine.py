"""What each rank of a vLLM layout holds: tensor x expert x data parallel, one engine or several beside each other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine_names import HEADS, VOCABULARY, WHOLE, Local, Segment, engine_locals
from qerl_rl.layout.holdings import Box, Holding
from qerl_rl.layout.tensors import Tensors, Weights

VOCABULARY_MULTIPLE = 64
"""vLLM pads vocabularies to a multiple of this before it splits them."""


class EngineLayout:
    """Layout of `engines` vLLM engines that don't know of each other; ranks of one follow each other.

    Within an engine rank = data_rank * tensor + tensor_rank. With expert_parallel all its ranks share the experts (the
    first ones hold one more where they don't divide); otherwise each expert is split over the tensor-parallel ranks.
    Raises: ConfigError where a size does not divide what it splits, or cuts through weights that share a scale.
    """

    def __init__(
        self,
        architecture: MoeArchitecture,
        tensor: int,
        data: int,
        expert_parallel: bool,
        tensors: Tensors | None = None,
        engines: int = 1,
    ) -> None:
        self.tensor, self.data, self.engines = tensor, data, engines
        self.expert_parallel = expert_parallel and tensor * data > 1
        self._locals = engine_locals(architecture, tensors or Weights())
        if self.expert_parallel and tensor > 1 and data > 1 and architecture.latent:
            # vLLM splits the sequence over these ranks instead, and computes shared experts with whole weights.
            self._locals = [_unsplit(local) if ".shared_experts." in local.name else local for local in self._locals]
        self._of_tensor = {
            segment.tensor.name: (local, number)
            for local in self._locals
            for number, segment in enumerate(local.segments)
        }
        checked: set[Hashable] = set()
        for segment in (segment for local in self._locals for segment in local.segments):
            if segment.kind not in checked:
                self._check(segment)
                checked.add(segment.kind)

    @property
    def world_size(self) -> int:
        return self.engines * self.tensor * self.data

    def pattern(self, tensor: str) -> Hashable:
        """Equal for tensors that are spread over the ranks alike."""
        local, number = self._of_tensor[tensor]
        return local.segments[number].kind

    def holdings_of(self, tensor: str, rank: int) -> list[Holding]:
        """What the rank holds of one tensor: one box, or (of a vocabulary's padding) nothing."""
        local, number = self._of_tensor[tensor]
        boxes = [self._box(segment, rank) for segment in local.segments]
        box, first = boxes[number], sum(_length(each, 0) for each in boxes[:number])
        if not box.elements:
            return []
        view = list(box.shape)
        view[0] = self._rows(local, boxes, rank)
        index = (slice(first, first + _length(box, 0)), *(slice(0, length) for length in box.shape[1:]))
        return [Holding(tensor, box, local.name, tuple(view), index)]

    def holdings(self, rank: int) -> list[Holding]:
        """All that a rank holds, in the order of the model."""
        return [
            holding
            for local in self._locals
            for segment in local.segments
            for holding in self.holdings_of(segment.tensor.name, rank)
        ]

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the rank's tensors, by name, with the rows that pad a vocabulary."""
        shapes: dict[str, tuple[int, ...]] = {}
        for local in self._locals:
            boxes = [self._box(segment, rank) for segment in local.segments]
            view = (self._rows(local, boxes, rank), *boxes[0].shape[1:])
            first = local.segments[0].tensor
            if local.name.endswith(".bias") or len(view) == 1:
                shapes[local.name] = (math.prod(view),)
            elif first.is_expert:
                shapes[local.name] = (view[0], math.prod(view[1:-1]), view[-1])
            else:
                shapes[local.name] = (math.prod(view[:-1]), view[-1])
        return shapes

    def _rows(self, local: Local, boxes: Sequence[Box], rank: int) -> int:
        """Dimension 0 of a view of a local tensor."""
        if local.segments[0].split == VOCABULARY:
            return _padded(local.segments[0].tensor.shape[0]) // self.tensor
        return sum(_length(box, 0) for box in boxes)

    def _box(self, segment: Segment, rank: int) -> Box:
        """The elements of the full tensor on a rank; none where it has the padding of a vocabulary only."""
        tensor, position = segment.tensor, rank % self.tensor
        start, stop = [0] * len(tensor.shape), list(tensor.shape)
        if tensor.is_expert and self.expert_parallel:
            in_engine = self.tensor * self.data
            start[0], stop[0] = _uneven_share(tensor.shape[0], in_engine, rank % in_engine)
            return Box(tuple(start), tuple(stop))
        dim, length = segment.dim, tensor.shape[segment.dim]
        if segment.split == VOCABULARY:
            rows = _padded(length) // self.tensor
            start[0], stop[0] = min(position * rows, length), min((position + 1) * rows, length)
        elif segment.split == HEADS and length < self.tensor:
            head = position // (self.tensor // length)
            start[dim], stop[dim] = head, head + 1
        elif segment.split != WHOLE:
            share = length // self.tensor
            start[dim], stop[dim] = position * share, (position + 1) * share
        return Box(tuple(start), tuple(stop))

    def _check(self, segment: Segment) -> None:
        tensor, ways = segment.tensor, self.tensor
        if segment.split == WHOLE or (tensor.is_expert and self.expert_parallel):
            return
        length = tensor.shape[segment.dim]
        if segment.split == VOCABULARY:
            length = _padded(length)
        if length % ways and not (segment.split == HEADS and ways % length == 0):
            fitting = " or ".join(str(size) for size in range(1, ways) if length % size == 0)
            ways_out = [f"set rollout.tensor_parallel to {fitting}"]
            if tensor.is_expert:
                ways_out.append("set rollout.expert_parallel to true")
            if segment.dim == len(tensor.shape) - 1:
                ways_out.append("quantize the model in smaller groups")
            raise ConfigError(
                f"rollout.tensor_parallel={ways} does not divide dimension {segment.dim} of {tensor.name} "
                f"{tensor.shape}.",
                fix=", or ".join(ways_out),
            )


def _unsplit(local: Local) -> Local:
    segments = tuple(Segment(segment.tensor, WHOLE, segment.dim) for segment in local.segments)
    return Local(local.name, segments)


def _padded(rows: int) -> int:
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _uneven_share(length: int, ways: int, position: int) -> tuple[int, int]:
    share, more = divmod(length, ways)
    start = position * share + min(position, more)
    return start, start + share + (position < more)


def _length(box: Box, dim: int) -> int:
    return box.stop[dim] - box.start[dim]
