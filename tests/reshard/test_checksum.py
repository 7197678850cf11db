"""The sum of a tensor doesn't depend on how it is cut up, and does on every bit and on every place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.layout.holdings import Box, FullTensor, Holding
from qerl_rl.reshard.checksum import Checksum, ChecksumError, weighted_sum
from tests.ranks import fresh_world

DTYPES = (torch.int8, torch.uint8, torch.bfloat16, torch.float32, torch.int32, torch.float8_e4m3fn)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)


def random_bits(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype).squeeze(-1)
    )


def width_of(dtype: torch.dtype, ends: Sequence[int]) -> int:
    return next(w for w in (8, 4, 2, 1) if w <= dtype.itemsize or all(e * dtype.itemsize % w == 0 for e in ends))


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box], int]:
    """A tensor, boxes that tile it, and the width of its integers."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    ends = [sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=2))}) for length in shape]
    boxes = [Box((), ())]
    for dimension in ends:
        pairs = list(itertools.pairwise(dimension))
        boxes = [Box((*box.start, a), (*box.stop, b)) for box in boxes for a, b in pairs]
    return random_bits(shape, dtype, draw(st.integers(0, 1000))), boxes, width_of(dtype, ends[-1])


@SETTINGS
@given(cut_tensors())
def test_shards_add_up_to_the_whole(case):
    tensor, boxes, width = case
    total = sum((weighted_sum(tensor[box.slices], box, width) for box in boxes), torch.tensor(0))
    assert total == weighted_sum(tensor, Box.of(tuple(tensor.shape)), width)


@SETTINGS
@given(cut_tensors(), st.integers(0, 2**30), st.integers(0, 7))
def test_every_bit_counts(case, place, bit):
    tensor, _, width = case
    other = tensor.clone()
    flat = other.view(-1).view(torch.uint8)
    flat[place % len(flat)] ^= 1 << bit
    box = Box.of(tuple(tensor.shape))
    assert weighted_sum(tensor, box, width) != weighted_sum(other, box, width)


@SETTINGS
@given(cut_tensors(), st.integers(0, 3), st.randoms(use_true_random=False))
def test_parts_that_change_places_are_noticed(case, dimension, random):
    tensor, _, width = case
    dimension = min(dimension, tensor.dim() - 1)
    order = list(range(tensor.shape[dimension]))
    random.shuffle(order)
    moved = (
        tensor.index_select(dimension, torch.tensor(order))
        if tensor.dtype != torch.float8_e4m3fn
        else (tensor.view(torch.uint8).index_select(dimension, torch.tensor(order)).view(tensor.dtype))
    )
    same = torch.equal(moved.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    box = Box.of(tuple(tensor.shape))
    assert (weighted_sum(tensor, box, width) == weighted_sum(moved, box, width)) == same


TENSORS = [
    FullTensor("experts", (4, 6, 16), torch.int8, 0, is_expert=True),
    FullTensor("odd", (5, 6), torch.bfloat16, 0),
    FullTensor("norm", (12,), torch.float32, 1),
]


@dataclass(frozen=True)
class Cut:
    """Each tensor in equal parts along a dimension, a part a rank; None: whole on every rank."""

    along: dict[str, int | None]
    world_size: int = 2

    def holdings(self, rank: int) -> list[Holding]:
        found = []
        for tensor in TENSORS:
            start, stop = [0] * len(tensor.shape), list(tensor.shape)
            dimension = self.along[tensor.name]
            if dimension is not None:
                half = tensor.shape[dimension] // 2
                start[dimension], stop[dimension] = rank * half, (rank + 1) * half
            box = Box(tuple(start), tuple(stop))
            whole = tuple(map(slice, (0,) * len(box.shape), box.shape))
            found.append(Holding(tensor.name, box, f"own.{tensor.name}", box.shape, whole))
        return found

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {holding.local: holding.view for holding in self.holdings(rank)}


@dataclass
class Shards:
    """A source and a target: what a rank should hold, changed by `spoil`."""

    layout: Cut
    spoil: tuple[int, str, Any] | None = None

    def __post_init__(self) -> None:
        rank = dist.get_rank()
        self.tensors, self.done = {}, []
        for number, (tensor, holding) in enumerate(zip(TENSORS, self.layout.holdings(rank), strict=True)):
            own = random_bits(tensor.shape, tensor.dtype, number)[holding.box.slices].contiguous()
            if self.spoil and self.spoil[:2] == (rank, tensor.name):
                own.view(torch.uint8).view(-1)[self.spoil[2][0]] += self.spoil[2][1]
            self.tensors[holding.local] = own

    def read(self, local: str) -> torch.Tensor:
        assert local not in self.done
        return self.tensors[local]

    write = read

    def finished(self, local: str) -> None:
        self.done.append(local)

    complete = finished


SOURCE = Cut({"experts": 0, "odd": None, "norm": None})
TARGET = Cut({"experts": 2, "odd": 1, "norm": None})
CASES = {
    "healthy": (None, None),
    "a bit of an expert on rank 1": (None, (1, "experts", (3, 16))),
    "one copy of two": (None, (1, "norm", (0, 1))),
    "what rank 0 sends": ((0, "odd", (7, 1)), None),
}


def compare_all() -> dict[str, tuple[str, int]]:
    """Of each case the error, and the bytes summed; in each, rank 0 reads `odd` twice and nobody the norm."""
    fresh_world()
    found = {}
    checksum = Checksum(TENSORS, SOURCE, TARGET, dist.get_rank(), torch.device("cpu"))
    for name, (sent, got) in CASES.items():
        source = Shards(SOURCE, sent)
        sums = checksum.begin(source, Shards(TARGET, got))
        for local in ("own.experts", "own.odd", "own.odd"):
            sums.source.read(local)
        sums.source.finished("own.experts")
        sums.source.finished("own.odd")
        for local in TARGET.local_shapes(0):
            sums.target.complete(local)
        try:
            sums.compare(step=7)
            error = ""
        except ChecksumError as raised:
            error = str(raised)
        found[name] = error, sums.summed_bytes
    return found


def test_what_arrived_otherwise_is_named_on_every_rank(two_ranks):
    for rank, found in enumerate(two_ranks(compare_all)):
        assert found["healthy"][0] == ""
        # Half of the experts and, of what both hold, the one that counts; on the other side each its own.
        shared = 0 if rank else 5 * 6 * 2 + 12 * 4
        assert found["healthy"][1] == 192 + shared + 192 + 30 + 48
        assert "step 7" in found["a bit of an expert on rank 1"][0]
        assert "experts (held by train ranks 0, 1 and rollout ranks 0, 1)" in found["a bit of an expert on rank 1"][0]
        assert "swap.checksum=always" in found["a bit of an expert on rank 1"][0]
        assert "norm (" in found["one copy of two"][0]
        assert "experts (" not in found["one copy of two"][0]
        assert "odd (" in found["what rank 0 sends"][0]


@pytest.mark.parametrize("spoiled", ["hole", "twice"])
def test_a_layout_that_does_not_hold_all_equally_often_is_refused(spoiled):
    broken = Cut({"experts": 0, "odd": 0, "norm": None}) if spoiled == "hole" else Uneven(TARGET.along)
    with pytest.raises(ValueError, match="is not held whole and equally often"):
        Checksum(TENSORS, broken, TARGET, 0, torch.device("cpu"))


class Uneven(Cut):
    def holdings(self, rank: int) -> list[Holding]:
        return super().holdings(rank)[: 3 if rank else 1] + ([] if rank else Cut(TARGET.along).holdings(1)[1:2])


def test_what_numbers_look_like_says_nothing_of_their_place():
    # Equal numbers everywhere: a sum without places would see no difference between any two cuts.
    ones = torch.ones(64, 64, dtype=torch.int8)
    parts = [int(weighted_sum(ones[:8], Box((8 * i, 0), (8 * i + 8, 64)), 8)) for i in range(8)]
    assert len(np.unique(parts)) == 8
