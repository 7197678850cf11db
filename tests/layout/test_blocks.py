"""Parts of a block: the ranks that are no replicas hold every element once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_rl.layout.blocks import Block, Coordinates, ParallelSizes


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ParallelSizes, list[Coordinates]]:
    """A layout and the coordinates of its ranks, in Megatron's order (tensor fastest, then data; experts alike)."""
    tensor, expert = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    expert_tensor = draw(st.sampled_from([1, tensor]))
    ranks = max(tensor, expert * expert_tensor) * draw(st.sampled_from([1, 2]))
    coordinates = [
        Coordinates(
            rank=rank,
            tensor=rank % tensor,
            pipeline=0,
            data=rank // tensor,
            expert=rank // expert_tensor % expert,
            expert_tensor=rank % expert_tensor,
            expert_data=rank // (expert_tensor * expert),
        )
        for rank in range(ranks)
    ]
    return ParallelSizes(tensor, 1, expert, expert_tensor), coordinates


@given(layouts(), st.sampled_from([None, 1, 2]), st.booleans())
def test_parts_of_the_sources_tile_the_block(
    layout: tuple[ParallelSizes, list[Coordinates]], split_dim: int | None, is_expert: bool
) -> None:
    sizes, ranks = layout
    block = Block((4, 8, 4), split_dim, is_expert)
    covered = torch.zeros(block.shape, dtype=torch.int)
    for at in ranks:
        if not block.is_replica(at):
            covered[block.part(sizes, at)] += 1
    assert covered.eq(1).all()


@given(layouts(), st.sampled_from([None, 1, 2]), st.booleans())
def test_replicas_hold_what_their_source_holds(
    layout: tuple[ParallelSizes, list[Coordinates]], split_dim: int | None, is_expert: bool
) -> None:
    sizes, ranks = layout
    block = Block((4, 8, 4), split_dim, is_expert)
    full = torch.arange(4 * 8 * 4)
    sources = [block.take(full, sizes, at) for at in ranks if not block.is_replica(at)]
    for at in ranks:
        part = block.take(full, sizes, at)
        assert part.shape == block.part_shape(sizes, at)
        assert any(torch.equal(part, source) for source in sources)


def test_dimension_that_does_not_divide_is_an_error() -> None:
    at = Coordinates(rank=0, tensor=0, pipeline=0, data=0, expert=0, expert_tensor=0, expert_data=0)
    with pytest.raises(ValueError, match="5 can't be split into 2"):
        Block((5, 3), 0).part(ParallelSizes(tensor=2), at)
