"""Plans over random layouts of up to 16 ranks: executed, they put every bit where slicing the full tensors puts it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.holdings import Box, FullTensor, Layout
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.layout.train import TrainLayout
from qerl_rl.reshard.plan import LARGEST_SHARE, Plan, make_plan
from qerl_rl.reshard.routes import cut, tile
from tests.reshard.simulated import (
    ARCHITECTURES,
    bytes_of_bucket,
    engine_layouts,
    execute,
    moe,
    random_full,
    same_bits,
    sliced,
    tensors_of,
    train_layouts,
)

SETTINGS = {"deadline": None, "derandomize": True}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[FullTensor], Layout, Layout]:
    """Full tensors, and two layouts of them: from the trainer to the engine, or back."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    tensors = draw(tensors_of(architecture))
    world_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    train = draw(train_layouts(architecture, tensors, world_size))
    engine = draw(engine_layouts(architecture, tensors, world_size))
    return full_tensors(architecture, tensors), train, engine


BUCKET_BYTES = st.sampled_from([1 << 14, 1 << 16, 1 << 20])
RANKS_PER_NODE = st.sampled_from([1, 2, 4, 16])


@settings(max_examples=40, **SETTINGS)
@given(pairs(), BUCKET_BYTES, RANKS_PER_NODE)
def test_executing_a_plan_there_and_back_equals_slicing(pair: tuple, bucket_bytes: int, ranks_per_node: int) -> None:
    tensors, train, engine = pair
    full = random_full(tensors)
    trained = [sliced(train, full, rank) for rank in range(train.world_size)]
    there = make_plan(tensors, train, engine, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node)
    served = execute(there, trained)
    assert all(same_bits(served[rank], sliced(engine, full, rank)) for rank in range(train.world_size))
    back = make_plan(tensors, engine, train, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node)
    returned = execute(back, served)
    assert all(same_bits(returned[rank], trained[rank]) for rank in range(train.world_size))


def _held(layout: Layout, tensors: list[FullTensor], rank: int) -> dict[str, torch.Tensor]:
    """Which elements of each full tensor a rank holds."""
    held = {tensor.name: torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors}
    for holding in layout.holdings(rank):
        held[holding.tensor][holding.box.slices] = True
    return held


@settings(max_examples=15, **SETTINGS)
@given(pairs(), BUCKET_BYTES, RANKS_PER_NODE)
def test_no_byte_moves_that_its_receiver_has_and_none_crosses_nodes_without_need(
    pair: tuple, bucket_bytes: int, ranks_per_node: int
) -> None:
    tensors, train, engine = pair
    plan = make_plan(tensors, train, engine, bucket_bytes=bucket_bytes, ranks_per_node=ranks_per_node)
    summary, world = plan.summary(), range(plan.world_size)
    size = {tensor.name: tensor.dtype.itemsize for tensor in tensors}
    held, needed = [_held(train, tensors, rank) for rank in world], [_held(engine, tensors, rank) for rank in world]
    missing, near = np.zeros(len(world), dtype=np.int64), 0
    for rank in world:
        node = range(
            rank // ranks_per_node * ranks_per_node, min((rank // ranks_per_node + 1) * ranks_per_node, len(world))
        )
        for name, wanted in needed[rank].items():
            absent = wanted & ~held[rank][name]
            on_node = torch.stack([held[other][name] for other in node]).any(0)
            missing[rank] += int(absent.sum()) * size[name]
            near += int((absent & on_node).sum()) * size[name]
    assert summary.received.tolist() == missing.tolist()
    assert summary.lower_bound == summary.moved == missing.sum()
    assert summary.moved_over_lower_bound == summary.experts_moved_over_lower_bound == 1.0
    assert (summary.same_node, summary.across_nodes) == (near, missing.sum() - near)
    assert summary.sent.sum() == summary.received.sum()
    needs = sum(int(wanted.sum()) * size[name] for rank in world for name, wanted in needed[rank].items())
    assert summary.copied.sum() == needs - missing.sum()


@settings(max_examples=15, **SETTINGS)
@given(pairs(), BUCKET_BYTES)
def test_buckets_hold_what_they_may_and_every_rank_has_as_many(pair: tuple, bucket_bytes: int) -> None:
    tensors, train, engine = pair
    plan = make_plan(tensors, train, engine, bucket_bytes=bucket_bytes, ranks_per_node=8)
    largest = max(tensor.dtype.itemsize * Box.of(tensor.shape).elements for tensor in tensors)
    for rank in range(plan.world_size):
        part = plan.for_rank(rank)
        assert len(part.buckets) == plan.bucket_count
        for number in range(plan.bucket_count):
            travels, copied = bytes_of_bucket(part, number)
            assert travels <= bucket_bytes
            assert copied <= max(bucket_bytes, largest)


def _senders(plan: Plan) -> list[tuple]:
    """Every box that travels: what, from, to, when."""
    return [
        (holding.tensor, holding.box, rank, peer, number)
        for rank in range(plan.world_size)
        for number, bucket in enumerate(plan.for_rank(rank).buckets)
        for peer, holdings in bucket.sends.items()
        for holding in holdings
    ]


@settings(max_examples=10, **SETTINGS)
@given(pairs(), RANKS_PER_NODE)
def test_a_plan_is_the_same_each_time_it_is_made(pair: tuple, ranks_per_node: int) -> None:
    tensors, train, engine = pair
    first, again = (
        _senders(make_plan(tensors, train, engine, bucket_bytes=1 << 16, ranks_per_node=ranks_per_node))
        for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize("ranks_per_node", [1, 16])
@pytest.mark.parametrize(
    ("train", "engine"),
    [
        (ParallelSizes(pipeline=2), (1, 16)),
        (ParallelSizes(tensor=2, pipeline=2), (4, 4)),
        (ParallelSizes(expert=2), (2, 8)),
        (ParallelSizes(tensor=2, expert=4, pipeline=2), (2, 8)),
    ],
)
def test_equal_replicas_send_as_much_as_each_other(
    train: ParallelSizes, engine: tuple[int, int], ranks_per_node: int
) -> None:
    """On 16 ranks replicas of a stage (of an expert-parallel rank) differ by one tensor at most."""
    architecture, world_size = moe(layers=4, experts=16), 16
    tensors = full_tensors(architecture, Weights())
    source = TrainLayout(architecture, train, world_size)
    plan = make_plan(
        tensors, source, EngineLayout(architecture, *engine, True), bucket_bytes=1 << 20, ranks_per_node=ranks_per_node
    )
    largest = max(tensor.dtype.itemsize * Box.of(tensor.shape).elements for tensor in tensors)
    replicas: dict[tuple, list[int]] = {}
    for rank in range(world_size):
        held = tuple((holding.tensor, holding.box) for holding in source.holdings(rank))
        replicas.setdefault(held, []).append(int(plan.summary().sent[rank]))
    for sent in replicas.values():
        assert len(sent) > 1
        assert max(sent) - min(sent) <= largest


@settings(max_examples=50, **SETTINGS)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(1, 60))
def test_pieces_of_a_box_tile_it_and_are_small_enough(shape: list[int], largest: int) -> None:
    covered = torch.zeros(shape, dtype=torch.int)
    for piece in cut(Box.of(tuple(shape)), largest):
        assert piece.elements <= largest
        covered[piece.slices] += 1
    assert covered.eq(1).all()


def test_overlaps_and_holes_of_boxes_are_seen() -> None:
    halves = Box((0, 0), (2, 4)), Box((2, 0), (4, 4))
    assert tile(halves, (4, 4))
    assert not tile(halves[:1], (4, 4))
    assert not tile((Box((0, 0), (2, 4)), Box((1, 0), (3, 4))), (4, 4))


def test_pipeline_stages_send_at_the_same_time_so_that_both_layouts_fit() -> None:
    """A stage's weights leave at the pace at which the engine's arrive, and not after those of the stages before it."""
    architecture = moe(layers=8)
    tensors, source = full_tensors(architecture, Weights()), TrainLayout(architecture, ParallelSizes(pipeline=2), 2)
    plan = make_plan(tensors, source, EngineLayout(architecture, 2, 1, False), bucket_bytes=1 << 16, ranks_per_node=2)
    for rank in range(2):
        part = plan.for_rank(rank)
        size = {
            side: {name: 2 * int(np.prod(shape)) for name, shape in layout.local_shapes(rank).items()}
            for side, layout in (("source", plan.source), ("target", plan.target))
        }
        held = shard = sum(size["source"].values())
        begun: set[str] = set()
        peak = held
        for bucket in part.buckets:
            written = [copy.target for copy in bucket.copies] + [
                each for got in bucket.receives.values() for each in got
            ]
            new = {holding.local for holding in written} - begun
            begun |= new
            held += sum(size["target"][name] for name in new)
            peak = max(peak, held)
            held -= sum(size["source"][name] for name in bucket.finished_sources)
        # One layer more than the larger of the two: a tensor is allocated whole when its first bytes come.
        layer = max(shard, sum(size["target"].values())) / architecture.layers * source.sizes.pipeline
        assert peak <= max(shard, sum(size["target"].values())) + 2 * layer


def test_layouts_of_different_worlds_and_tiny_buckets_are_refused() -> None:
    architecture = moe()
    tensors, two = full_tensors(architecture, Weights()), TrainLayout(architecture, ParallelSizes(), 2)
    with pytest.raises(ConfigError, match=r"2 ranks, the rollout engine 4.*rollout.data_parallel"):
        make_plan(tensors, two, EngineLayout(architecture, 2, 2, True), bucket_bytes=1 << 20, ranks_per_node=8)
    engine = EngineLayout(architecture, 2, 1, True)
    with pytest.raises(ConfigError, match=r"swap.bucket_bytes=7 "):
        make_plan(tensors, two, engine, bucket_bytes=2 * LARGEST_SHARE - 1, ranks_per_node=8)


def test_a_source_with_a_hole_is_refused() -> None:
    class Forgetful(TrainLayout):
        def holdings_of(self, tensor: str, rank: int) -> list:
            return super().holdings_of(tensor, rank) if rank else []

    architecture = moe()
    source = Forgetful(architecture, ParallelSizes(expert=2), 2)
    engine = EngineLayout(architecture, 1, 2, True)
    with pytest.raises(ValueError, match=r"don't hold model.layers.0.mlp.experts.w13 .* without hole"):
        make_plan(full_tensors(architecture, Weights()), source, engine, bucket_bytes=1 << 20, ranks_per_node=8)
