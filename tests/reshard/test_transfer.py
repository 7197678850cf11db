"""Resharding gives every rank the slices that it should hold, in time, with two buckets of staging."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from time import perf_counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.holdings import Box, FullTensor, Holding, Layout
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.layout.train import TrainLayout
from qerl_rl.platform.device import CPU
from qerl_rl.platform.shared_memory import SharedBlock
from qerl_rl.quant.quantize import Recipe
from qerl_rl.reshard.exchange import (
    ALIGNMENT,
    Exchange,
    Messages,
    MixedExchange,
    ProcessGroupExchange,
    TransferError,
)
from qerl_rl.reshard.node_exchange import NodeExchange, make_exchange
from qerl_rl.reshard.plan import Bucket, Copy, RankPlan, make_plan
from qerl_rl.reshard.transfer import TransferReport, transfer
from tests.ranks import fresh_world
from tests.reshard.random_layouts import Piece, RandomLayout, random_layout, random_pairs, random_values
from tests.reshard.simulated_ranks import SimulatedExchange, SimulatedWorld


class Freeing:
    """A source of full tensors' slices whose tensors are gone once they are finished."""

    def __init__(self, layout: Layout, rank: int, values: Mapping[str, torch.Tensor]) -> None:
        self.tensors = slices(layout, rank, values) if rank < layout.world_size else {}

    def read(self, local: str) -> torch.Tensor:
        return self.tensors[local]

    def finished(self, local: str) -> None:
        del self.tensors[local]


class Checking:
    """A target that makes its tensors at the first write, and looks at each when it is said to be complete."""

    def __init__(self, layout: Layout, rank: int, values: Mapping[str, torch.Tensor]) -> None:
        self.expected = slices(layout, rank, values) if rank < layout.world_size else {}
        self.open: dict[str, torch.Tensor] = {}
        self.complete_names: list[str] = []

    def write(self, local: str) -> torch.Tensor:
        assert local not in self.complete_names, f"{local} is written after it was complete"
        if local not in self.open:
            self.open[local] = unwritten(self.expected[local].shape, self.expected[local].dtype)
        return self.open[local]

    def complete(self, local: str) -> None:
        assert same_bits(self.open.pop(local), self.expected[local]), local
        self.complete_names.append(local)

    def check(self) -> None:
        assert sorted(self.complete_names) == sorted(self.expected)
        assert not self.open


def unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What memory happens to hold, and what stays in rows that pad a vocabulary."""
    return torch.full((*shape[:-1], shape[-1] * dtype.itemsize), 0x5A, dtype=torch.uint8).view(dtype)


def slices(layout: Layout, rank: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rank's tensors, by plain slicing of the full ones."""
    holdings = layout.holdings(rank)
    dtypes = {holding.local: values[holding.tensor].dtype for holding in holdings}
    made = {name: unwritten(shape, dtypes[name]) for name, shape in layout.local_shapes(rank).items()}
    for holding in holdings:
        holding.take(made[holding.local]).copy_(values[holding.tensor][holding.box.slices])
    return made


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(raw(left), raw(right))


def reshard(plan: RankPlan, source: Layout, target: Layout, values: Mapping, exchange: Exchange) -> TransferReport:
    """One rank's transfer between sides that check themselves."""
    sources, targets = Freeing(source, plan.rank, values), Checking(target, plan.rank, values)
    report = transfer(plan, sources, targets, exchange)
    targets.check()
    assert not sources.tensors
    return report


def both_ways(tensors: list[FullTensor], one: Layout, other: Layout, bucket_bytes: int):
    options = {"bucket_bytes": bucket_bytes, "ranks_per_node": 2}
    return [
        (make_plan(tensors, one, other, **options), one, other),
        (make_plan(tensors, other, one, **options), other, one),
    ]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(world=st.integers(1, 16), seed=st.integers(0, 2**20), bucket_bytes=st.sampled_from([64, 512, 1 << 20]))
def test_any_layout_becomes_any_other_and_back_bit_for_bit(world, seed, bucket_bytes):
    pairs = random_pairs(seed)
    tensors = [tensor for pair in pairs for tensor in pair]
    values = {tensor.name: random_values(tensor) for tensor in tensors}
    plans = both_ways(
        tensors, random_layout(pairs, world, seed + 1), random_layout(pairs, world, seed + 2), bucket_bytes
    )
    simulated = SimulatedWorld(world)

    def rank_runs(rank):
        peers = frozenset(peer for peer in range(world) if peer // 2 == rank // 2)
        near, far = (SimulatedExchange(simulated, rank, channel) for channel in ("near", "far"))
        exchange = MixedExchange(near, far, peers)
        return [reshard(plan.for_rank(rank), source, target, values, exchange) for plan, source, target in plans]

    found = simulated.run(rank_runs)
    for reports, (_, _, target) in zip(zip(*found, strict=True), plans, strict=True):
        assert sum(report.sent_bytes for report in reports) == sum(report.received_bytes for report in reports)
        for rank, report in enumerate(reports):
            whole = sum(tensor.nbytes for tensor in slices(target, rank, values).values())
            assert report.copied_bytes + report.received_bytes == whole


def real_exchange(kind: str, group, timeout_s: float) -> Exchange:
    made = make_exchange(CPU, timeout_s, group)
    assert isinstance(made, NodeExchange)
    return made if kind == "node" else ProcessGroupExchange(CPU, timeout_s, group)


def addresses(exchange) -> list[int]:
    """Of the two slots."""
    if isinstance(exchange, NodeExchange):
        return [exchange._block.view(slot * exchange._slot_bytes, 1).data_ptr() for slot in range(2)]
    return [memory.data_ptr() for memory in exchange._memory]


MODEL = MoeArchitecture(
    family="qwen2_moe",
    layers=2,
    hidden_size=64,
    attention_heads=4,
    key_value_heads=2,
    head_dim=16,
    experts=4,
    experts_per_token=2,
    expert_width=64,
    shared_expert_width=64,
    vocabulary_size=100,
    max_positions=64,
    norm_eps=1e-6,
    rope_theta=1e6,
    normalized_top_k=True,
    qk_norm=False,
    qkv_bias=True,
    tied_embeddings=True,
)
TRAIN = {
    "TP2": ParallelSizes(tensor=2, expert_tensor=2),
    "EP2": ParallelSizes(expert=2),
    "PP2": ParallelSizes(pipeline=2),
    "DP2": ParallelSizes(),
}
ROLLOUT = {"TP2": (2, 1, False, 1), "DP2+EP2": (1, 2, True, 1), "two engines": (1, 1, False, 2)}
FORMATS = {"bf16": None, "int8": Recipe("w8a8"), "int4": Recipe("w4a16", group_size=32)}


def swap_between_engines(kind: str):
    """Real layouts, every pair and format there and back: the number of transfers and of bytes that came."""
    fresh_world()
    rank = dist.get_rank()
    exchange = real_exchange(kind, None, 20.0)
    received = []
    for recipe in FORMATS.values():
        weights = Weights() if recipe is None else Weights.chosen_by(MODEL, recipe.format_of)
        tensors = full_tensors(MODEL, weights)
        values = {tensor.name: random_values(tensor) for tensor in tensors}
        for sizes, (tensor, data, expert_parallel, engines) in itertools.product(TRAIN.values(), ROLLOUT.values()):
            train = TrainLayout(MODEL, sizes, 2, weights)
            rollout = EngineLayout(MODEL, tensor, data, expert_parallel, weights, engines)
            for plan, source, target in both_ways(tensors, train, rollout, 1 << 16):
                report = reshard(plan.for_rank(rank), source, target, values, exchange)
                received.append(report.received_bytes)
    return len(received), sum(received)


@pytest.mark.parametrize("kind", ["node", "process group"])
def test_engines_layouts_on_real_ranks_in_every_format_bit_for_bit(two_ranks, kind):
    for transfers, received in two_ranks(swap_between_engines, kind):
        assert transfers == 2 * len(TRAIN) * len(ROLLOUT) * len(FORMATS)
        assert received > 0


def swap_on_real_ranks(kind: str, bucket_bytes: int):
    """There and back between several random layouts, twice over with one exchange."""
    fresh_world()
    rank = dist.get_rank()
    exchange = real_exchange(kind, None, 20.0)
    pairs = random_pairs(5, pairs=4)
    tensors = [tensor for pair in pairs for tensor in pair]
    values = {tensor.name: random_values(tensor) for tensor in tensors}
    layouts = [random_layout(pairs, 2, seed) for seed in range(6)]
    ways = [way for pair in itertools.pairwise(layouts) for way in both_ways(tensors, *pair, bucket_bytes)]
    moved, places = [], []
    for _ in range(2):
        for plan, source, target in ways:
            moved.append(reshard(plan.for_rank(rank), source, target, values, exchange).received_bytes)
        places.append(addresses(exchange))
    boxes = max(
        sum(map(len, (*bucket.sends.values(), *bucket.receives.values())))
        for plan, _, _ in ways
        for bucket in plan.for_rank(rank).buckets
    )
    return moved, places, exchange.staging_bytes, boxes


@pytest.mark.parametrize("kind", ["node", "process group"])
def test_real_ranks_reshard_and_use_their_two_buckets_again(two_ranks, kind):
    bucket_bytes = 96
    for moved, places, staging_bytes, boxes in two_ranks(swap_on_real_ranks, kind, bucket_bytes):
        assert sum(moved) > 0
        assert moved[: len(moved) // 2] == moved[len(moved) // 2 :]
        assert places[0] == places[1]
        assert staging_bytes <= 2 * (bucket_bytes + boxes * ALIGNMENT)


class Failing(Freeing):
    """A source that breaks down when it is asked for the tensors of the third layer."""

    def read(self, local: str) -> torch.Tensor:
        if local.startswith("2"):
            raise OSError("the disk is gone")
        return super().read(local)


def halves(pairs: list, dim: int) -> RandomLayout:
    """Two ranks, each with its half along a dimension."""
    pieces = []
    for pair in pairs:
        shape = pair[0].shape
        for rank in range(2):
            start, stop = [0] * len(shape), list(shape)
            start[dim], stop[dim] = rank * shape[dim] // 2, (rank + 1) * shape[dim] // 2
            pieces.append(Piece(pair, Box(tuple(start), tuple(stop)), frozenset([rank]), "apart"))
    return RandomLayout(2, tuple(pieces))


left_behind: list[Exchange] = []
"""Of ranks that failed: one that is gone is noticed at once, and the deadline is to be seen."""


def swap_with_a_peer_that_fails(kind: str):
    """When rank 1 fails in the middle: what each rank says, after how long, what was complete, the bucket to blame."""
    fresh_world()
    rank = dist.get_rank()
    # Of its own: a group whose peer did not come is lost.
    exchange = real_exchange(kind, dist.new_group([0, 1]), 0.5)
    left_behind.append(exchange)
    pairs = [tuple(FullTensor(f"{layer}.{name}", (4, 4), torch.int8, layer) for name in "ab") for layer in range(5)]
    tensors = [tensor for pair in pairs for tensor in pair]
    values = {tensor.name: random_values(tensor) for tensor in tensors}
    rows, columns = halves(pairs, 0), halves(pairs, 1)
    plan = make_plan(tensors, rows, columns, bucket_bytes=16, ranks_per_node=2).for_rank(rank)
    sources, targets = (Failing if rank else Freeing)(rows, rank, values), Checking(columns, rank, values)
    begin = perf_counter()
    try:
        transfer(plan, sources, targets, exchange)
    except (TransferError, OSError) as error:
        failing = next(
            number
            for number, bucket in enumerate(plan.buckets, start=1)
            if any(holding.tensor.startswith("2") for holding in bucket.sends[1 - rank])
        )
        return str(error), perf_counter() - begin, targets.complete_names, failing
    return None


@pytest.mark.parametrize("kind", ["node", "process group"])
def test_a_peer_that_fails_is_named_with_its_bucket_after_the_deadline(two_ranks, kind):
    (error, seconds, complete, failing), (failure, *_) = two_ranks(swap_with_a_peer_that_fails, kind)
    assert failure == "the disk is gone"
    # The node's exchange misses the word that the bucket before was read.
    bucket = {"node": failing - 1, "process group": failing}[kind]
    assert re.search(rf"bucket {bucket} of \d+: waited 0\.[5-9] s for .*rank 1", error), error
    assert "fault.train_timeout_s" in error
    assert seconds >= 0.5
    assert {name[0] for name in complete} == {"0", "1"}


def exchange_that_differs():
    """What a rank says to a message of another size than it was promised."""
    fresh_world()
    rank = dist.get_rank()
    exchange = real_exchange("node", None, 5.0)
    exchange.open([Messages({1: 8}, {}) if rank == 0 else Messages({}, {0: 16})])
    exchange.outgoing(0)
    exchange.start(0)
    try:
        exchange.incoming(0)
    except TransferError as error:
        exchange.release(0)
        return str(error)
    exchange.close()
    return ""


def test_plans_that_differ_are_noticed(two_ranks):
    silent, error = two_ranks(exchange_that_differs)
    assert not silent
    assert "rank 0 sent 8 bytes of bucket 1 where 16 of bucket 1 were due: the two ranks' plans differ" in error


class Kept:
    """A source and target of given tensors, which lists what it is told."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors
        self.told: list[str] = []

    def read(self, local: str) -> torch.Tensor:
        return self.tensors[local]

    write = read

    def finished(self, local: str) -> None:
        self.told.append(local)

    complete = finished


def test_what_stays_on_a_rank_is_rounded_as_what_travels():
    everything = Box((0,), (1000,))
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))

    def holding(local):
        return Holding("norm", everything, local, (1000,), (slice(0, 1000),))

    copies = tuple(Copy(holding("master"), holding(name)) for name in ("wide", "narrow"))
    plan = RankPlan(0, 1, {"norm": torch.bfloat16}, (Bucket(copies, {}, {}, ("master",), ("wide", "narrow")),))
    targets = Kept(wide=torch.zeros(1000), narrow=torch.zeros(1000, dtype=torch.bfloat16))
    report = transfer(plan, Kept(master=values), targets, SimulatedExchange(SimulatedWorld(1), 0))
    assert torch.equal(targets.tensors["narrow"], values.bfloat16())
    assert torch.equal(targets.tensors["wide"], values.bfloat16().float())
    assert report.copied_bytes == 2 * 2 * 1000


def test_each_tensor_is_let_go_of_at_its_last_use_in_the_bucket():
    """Of a bucket of many tensors, sources leave while targets come, also those that the bucket does not touch."""
    names = [f"{number}" for number in range(4)]
    box = Box((0,), (8,))
    copies = tuple(
        Copy(*(Holding(name, box, f"{side}{name}", (8,), (slice(0, 8),)) for side in "st")) for name in names
    )
    ends = tuple(f"s{name}" for name in names), tuple(f"t{name}" for name in names)
    plan = RankPlan(0, 1, dict.fromkeys(names, torch.int8), (Bucket(copies, {}, {}, (*ends[0], "replica"), ends[1]),))
    order: list[str] = []
    sides = []
    for side in "st":
        kept = Kept(**{f"{side}{name}": torch.ones(8, dtype=torch.int8) for name in names})
        kept.told = order
        sides.append(kept)
    transfer(plan, *sides, SimulatedExchange(SimulatedWorld(1), 0))
    assert order == ["s0", "t0", "s1", "t1", "s2", "t2", "s3", "t3", "replica"]


def test_a_shared_block_has_no_name_that_a_crash_leaves_behind():
    block = SharedBlock.create()
    block.grow(64)
    block.view(0, 64).fill_(7)
    other = SharedBlock.open(block.address)
    assert other.view(16, 16).tolist() == [7] * 16
    block.grow(1 << 20)
    block.view(1 << 19, 8).fill_(9)
    assert other.view(1 << 19, 8).tolist() == [9] * 8
    assert os.fstat(block.address.file).st_nlink == 0, "no folder of the machine names it"
    with pytest.raises(ValueError, match="shared block of 1048576"):
        other.view(1 << 20, 1)


def test_an_address_of_another_machine_is_refused():
    block = SharedBlock.create()
    with pytest.raises(OSError, match="is not qerl-rl-other"):
        SharedBlock.open(block.address._replace(title="qerl-rl-other"))
    with pytest.raises(FileNotFoundError):
        SharedBlock.open(block.address._replace(process=2**22 + 1))  # Linux has no larger process ids.
