"""A sum of what the trainer hands over and one of what each engine got: equal, or a swap has gone wrong.

The sum of a tensor is that of its bytes, as integers modulo 2**64, each times an odd number that follows from its place
in the *full* tensor. Layouts thus have no part in it: shards add up to what the whole would give. Any single wrong
integer changes it (an odd factor loses nothing), and so does a right one in another place, up to an accident in
billions. The number of a place is the product of one number for each dimension, so that a shard needs few of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
import torch.distributed as dist

from qerl_rl.layout.holdings import Box, FullTensor, Holding, Layout
from qerl_rl.reshard.transfer import Source, Target

CHUNK_INTEGERS = 1 << 16
"""Multiplied and added up at once: half a MiB stays in a core's cache."""
SHOWN = 3
"""Tensors that an error names."""
Holders = list[dict[Box, list[int]]]
"""By number of the tensor: each box that a layout cuts it into, and the ranks that hold it."""


class ChecksumError(RuntimeError):
    """What arrived is not what was sent."""


@dataclass(frozen=True)
class _Part:
    """A box of one of the rank's tensors. width: bytes of the integers it is summed in; factor: what it counts."""

    number: int
    holding: Holding
    dtype: torch.dtype
    width: int
    factor: int


class Checksum:
    """How this rank's parts count, from `source` to `target`: made once, on all ranks alike.

    device: where sums are added up over ranks.
    Raises: ValueError when a layout leaves a hole in a tensor, or holds parts of it unequally often.
    """

    def __init__(
        self, tensors: Sequence[FullTensor], source: Layout, target: Layout, rank: int, device: torch.device
    ) -> None:
        self.tensors, self.device = list(tensors), device
        self.holders = (_holders(self.tensors, source), _holders(self.tensors, target))
        replicas = [_replicas(*pair) for pair in zip(self.tensors, self.holders[1], strict=True)]
        for pair in zip(self.tensors, self.holders[0], strict=True):
            _replicas(*pair)
        # Of the source's copies one counts; of the target's all do, each with a factor of its own.
        self.factors = torch.tensor([_wrapped(sum(map(_odd, range(count)))) for count in replicas])
        widths = [_width(*both) for both in zip(self.tensors, *self.holders, strict=True)]
        numbers = {tensor.name: number for number, tensor in enumerate(self.tensors)}
        self.parts: tuple[dict[str, list[_Part]], dict[str, list[_Part]]] = ({}, {})
        for side, layout in enumerate((source, target)):
            for holding in layout.holdings(rank):
                number = numbers[holding.tensor]
                copy = self.holders[side][number][holding.box].index(rank)
                if side == 1 or copy == 0:
                    factor = _odd(copy) if side == 1 else 1
                    part = _Part(number, holding, self.tensors[number].dtype, widths[number], factor)
                    self.parts[side].setdefault(holding.local, []).append(part)

    def begin(self, source: Source, target: Target) -> SwapSums:
        """Count one swap."""
        return SwapSums(self, source, target)


@dataclass
class SwapSums:
    """The sums of one swap on one rank. source and target: to be used by the transfer in place of what was given.

    seconds, summed_bytes: what it took so far.
    """

    checksum: Checksum
    own_source: Source
    own_target: Target
    seconds: float = 0.0
    summed_bytes: int = 0
    _waiting: set[str] = field(init=False)
    _sums: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._waiting = set(self.checksum.parts[0])
        self._sums = torch.zeros(2, len(self.checksum.tensors), dtype=torch.int64, device=self.checksum.device)

    @property
    def source(self) -> Source:
        return _CountedSource(self)

    @property
    def target(self) -> Target:
        return _CountedTarget(self)

    def count_source(self, local: str, tensor: torch.Tensor) -> None:
        """Add what the rank sends, the first time that it is read."""
        if local in self._waiting:
            self._waiting.remove(local)
            self._count(0, local, tensor)

    def count_target(self, local: str, tensor: torch.Tensor) -> None:
        """Add what the rank got."""
        self._count(1, local, tensor)

    def _count(self, side: int, local: str, tensor: torch.Tensor) -> None:
        begin = perf_counter()
        for part in self.checksum.parts[side].get(local, ()):
            values = part.holding.take(tensor).to(part.dtype)
            self._sums[side, part.number] += weighted_sum(values, part.holding.box, part.width) * part.factor
            self.summed_bytes += values.nbytes
        self.seconds += perf_counter() - begin

    def compare(self, step: int) -> None:
        """Compare after the transfer; collective.

        Raises: ChecksumError, on all ranks, with tensors whose sums differ and the ranks that hold them.
        """
        for local in sorted(self._waiting):
            # The plan took these from other ranks that hold the same.
            self.count_source(local, self.own_source.read(local))
            self.own_source.finished(local)
        begin = perf_counter()
        dist.all_reduce(self._sums)
        sent, got = self._sums.cpu()
        wrong = torch.nonzero(sent * self.checksum.factors != got).flatten().tolist()
        self.seconds += perf_counter() - begin
        if wrong:
            raise ChecksumError(_message(self.checksum, wrong, step))


@dataclass
class _CountedSource:
    sums: SwapSums

    def read(self, local: str) -> torch.Tensor:
        tensor = self.sums.own_source.read(local)
        self.sums.count_source(local, tensor)
        return tensor

    def finished(self, local: str) -> None:
        if local in self.sums._waiting:
            self.read(local)
        self.sums.own_source.finished(local)


@dataclass
class _CountedTarget:
    sums: SwapSums

    def write(self, local: str) -> torch.Tensor:
        return self.sums.own_target.write(local)

    def complete(self, local: str) -> None:
        self.sums.count_target(local, self.sums.own_target.write(local))
        self.sums.own_target.complete(local)


def weighted_sum(values: torch.Tensor, box: Box, width: int) -> torch.Tensor:
    """The sum of `values`, a box of a full tensor, times the numbers of their places: int64 scalar, modulo 2**64.

    width: bytes of the integers that the last dimension is read in, a whole number of them in every box of the tensor.
    """
    per_integer = max(width // values.element_size(), 1)
    start = (*box.start[:-1], box.start[-1] // per_integer)
    stop = (*box.stop[:-1], box.stop[-1] // per_integer)
    *outer, last = [
        _numbers(dimension, first, end, values.device)
        for dimension, (first, end) in enumerate(zip(start, stop, strict=True))
    ]
    rows = values.contiguous().reshape(-1, values.shape[-1])
    sums = [
        chunk.view(INTEGERS[width]).to(torch.int64).mul(last).sum(-1)
        for chunk in rows.split(max(CHUNK_INTEGERS // len(last), 1))
    ]
    total = torch.cat(sums).reshape(values.shape[:-1])
    for numbers in reversed(outer):
        total = (total * numbers).sum(-1)
    return total


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _numbers(dimension: int, first: int, end: int, device: torch.device) -> torch.Tensor:
    """An odd number for each index first <= i < end of a dimension: int64 [end - first].

    splitmix64 (Steele, Lea and Flood 2014) of index and dimension; int64 wraps as unsigned numbers do.
    """
    numbers = torch.arange(first, end, dtype=torch.int64, device=device)
    numbers.add_(1 + (dimension << 48)).mul_(_wrapped(0x9E3779B97F4A7C15))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ _shifted(numbers, shift)) * _wrapped(factor)
    return (numbers ^ _shifted(numbers, 31)) | 1


def _shifted(numbers: torch.Tensor, shift: int) -> torch.Tensor:
    # torch's shift draws in the sign.
    return (numbers >> shift) & ((1 << (64 - shift)) - 1)


def _wrapped(number: int) -> int:
    """The same modulo 2**64, as an int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _odd(copy: int) -> int:
    return int(_numbers(63, copy, copy + 1, torch.device("cpu")))


def _holders(tensors: Sequence[FullTensor], layout: Layout) -> Holders:
    numbers = {tensor.name: number for number, tensor in enumerate(tensors)}
    found: Holders = [{} for _ in tensors]
    for rank in range(layout.world_size):
        for holding in layout.holdings(rank):
            found[numbers[holding.tensor]].setdefault(holding.box, []).append(rank)
    return found


def _replicas(tensor: FullTensor, holders: dict[Box, list[int]]) -> int:
    """How many ranks hold each part."""
    counts = {len(ranks) for ranks in holders.values()}
    if len(counts) != 1 or sum(box.elements for box in holders) != math.prod(tensor.shape):
        raise ValueError(f"{tensor.name} is not held whole and equally often: {sorted(counts)} ranks hold its parts")
    return counts.pop()


def _width(tensor: FullTensor, *holders: Iterable[Box]) -> int:
    """Bytes of the largest integers that no box cuts apart."""
    size = tensor.dtype.itemsize
    ends = {end * size for boxes in holders for box in boxes for end in (box.start[-1], box.stop[-1])}
    return next(width for width in (8, 4, 2, 1) if width <= size or not any(end % width for end in ends))


def _message(checksum: Checksum, wrong: Sequence[int], step: int) -> str:
    shown = "; ".join(_line(checksum, number) for number in wrong[:SHOWN])
    more = f" and {len(wrong) - SHOWN} tensors more" if len(wrong) > SHOWN else ""
    return (
        f"swap of step {step}: the engine got something else than the trainer sent in {shown}{more}. "
        "Its weights are of no use: resume the run from its last checkpoint, with swap.checksum=always. Other tensors "
        "each time mean memory or network that fails, the same ones a fault in how these sizes of train.* and "
        "rollout.* are resharded, which other sizes go around"
    )


def _line(checksum: Checksum, number: int) -> str:
    sent, got = (sorted(_ranks(side[number].values())) for side in checksum.holders)
    return f"{checksum.tensors[number].name} (held by train ranks {_shown(sent)} and rollout ranks {_shown(got)})"


def _ranks(holders: Iterable[list[int]]) -> Iterator[int]:
    return iter({rank for ranks in holders for rank in ranks})


def _shown(ranks: Sequence[int]) -> str:
    first = ", ".join(map(str, ranks[:8]))
    return f"{first}, ... {ranks[-1]}" if len(ranks) > 8 else first
