"""Plans over random layouts of up to 16 ranks: executed, they put every bit where slicing the full tensors puts it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.layout.holdings import Layout
from qerl_rl.layout.tensors import full_tensors
from qerl_rl.reshard.plan import make_plan
from tests.reshard.simulated import (
    deepseek,
    engine_layouts,
    execute,
    moe,
    random_full,
    same_bits,
    sliced,
    tensors_of,
    train_layouts,
)

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list, Layout, Layout]:
    """Full tensors, a layout of the trainer and one of the engine."""
    architecture = draw(st.sampled_from([*map(moe, FAMILIES), moe(experts=12), deepseek(), deepseek(q_lora_rank=None)]))
    tensors = draw(tensors_of(architecture))
    world_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    train = draw(train_layouts(architecture, tensors, world_size))
    engine = draw(engine_layouts(architecture, tensors, world_size))
    return full_tensors(architecture, tensors), train, engine


@settings(deadline=None, derandomize=True, max_examples=40)
@given(pairs(), st.sampled_from([4096, 32768, 1 << 20]), st.sampled_from([1, 2, 4, 16]))
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
