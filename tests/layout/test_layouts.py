"""What ranks hold of each full tensor: all of it, evenly or alike, under the engines' names and shapes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.holdings import Box, FullTensor, Layout
from qerl_rl.layout.parts import LatentAttention
from qerl_rl.layout.slots import padded_vocabulary
from qerl_rl.layout.tensors import Adapters, Weights, full_tensors
from qerl_rl.layout.train import TrainLayout
from qerl_rl.quant.formats import get_format
from tests.reshard.simulated import ARCHITECTURES, deepseek, engine_layouts, moe, tensors_of, train_layouts


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[FullTensor], Layout]:
    """A layout of up to 16 ranks, of the trainer or the engine, and the tensors it is of."""
    architecture = draw(st.sampled_from(ARCHITECTURES))
    tensors = draw(tensors_of(architecture))
    world_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]))
    kind = draw(st.sampled_from([train_layouts, engine_layouts]))
    return full_tensors(architecture, tensors), draw(kind(architecture, tensors, world_size))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(layouts())
def test_boxes_tile_every_full_tensor_and_replicas_are_equal(drawn: tuple[list[FullTensor], Layout]) -> None:
    tensors, layout = drawn
    boxes: dict[str, set[Box]] = {tensor.name: set() for tensor in tensors}
    for rank in range(layout.world_size):
        for holding in layout.holdings(rank):
            boxes[holding.tensor].add(holding.box)
    for tensor in tensors:
        covered = torch.zeros(tensor.shape, dtype=torch.int)
        for box in boxes[tensor.name]:
            covered[box.slices] += 1
        assert covered.eq(1).all(), tensor.name


@settings(deadline=None, derandomize=True, max_examples=40)
@given(layouts())
def test_local_tensors_are_filled_but_for_the_padding_of_a_vocabulary(drawn: tuple[list[FullTensor], Layout]) -> None:
    _, layout = drawn
    for rank in range(layout.world_size):
        filled = {name: torch.zeros(shape, dtype=torch.int) for name, shape in layout.local_shapes(rank).items()}
        for holding in layout.holdings(rank):
            taken = holding.take(filled[holding.local])
            assert tuple(taken.shape) == holding.box.shape
            taken += 1
        for name, counts in filled.items():
            is_vocabulary = name.split(".")[-2] in ("word_embeddings", "output_layer", "embed_tokens", "lm_head")
            rows = counts.flatten(1).amin(1) if counts.dim() > 1 else counts
            assert not counts.numel() or counts.max() == 1 or is_vocabulary
            assert rows.eq(1).all() or is_vocabulary
            # What pads a vocabulary comes after it.
            assert rows.diff().le(0).all()


@settings(deadline=None, derandomize=True, max_examples=20)
@given(layouts())
def test_tensors_of_one_pattern_are_spread_alike(drawn: tuple[list[FullTensor], Layout]) -> None:
    tensors, layout = drawn
    spread: dict[object, list] = {}
    for tensor in tensors:
        boxes = [
            [holding.box for holding in layout.holdings_of(tensor.name, rank)] for rank in range(layout.world_size)
        ]
        assert spread.setdefault((tensor.shape, layout.pattern(tensor.name)), boxes) == boxes


def test_full_tensors_have_the_shapes_of_the_exchange() -> None:
    architecture = moe("qwen2_moe", layers=1)
    weights = Weights.chosen_by(architecture, lambda name: get_format("w4a16", 32) if "experts." in name else None)
    shapes = {tensor.name: tensor.shape for tensor in full_tensors(architecture, weights)}
    layer, hidden, experts, width = "model.layers.0.", 64, 8, 128
    assert shapes[f"{layer}self_attn.q_proj.weight"] == (8, 16, hidden)
    assert shapes[f"{layer}self_attn.k_proj.bias"] == (4, 16)
    assert shapes[f"{layer}mlp.experts.w13_packed"] == (experts, 2, width, hidden // 8)
    assert shapes[f"{layer}mlp.experts.w2_scale"] == (experts, hidden, width // 32)
    assert shapes[f"{layer}mlp.shared_expert.up_proj.weight"] == (128, hidden)
    assert "lm_head.weight" not in shapes
    rank, adapters = 4, Adapters(LoraConfig(rank=4))
    shapes = {tensor.name: tensor.shape for tensor in full_tensors(architecture, adapters)}
    assert shapes[f"{layer}self_attn.qkv_proj.lora_B:v"] == (4, 16, rank)
    assert shapes[f"{layer}mlp.experts.w13.lora_B"] == (experts, 2, width, rank)
    assert shapes[f"{layer}mlp.shared_expert.gate_up_proj.lora_B"] == (2, 128, rank)


def test_pipeline_stages_may_have_unequal_numbers_of_layers() -> None:
    """DeepSeek-V3's 61 layers over 8 stages."""
    architecture, stages = deepseek(layers=61, dense_layers=3), (8,) * 5 + (7,) * 3
    layout = TrainLayout(architecture, ParallelSizes(pipeline=8, layers_per_stage=stages), 8)
    for rank, layers in enumerate(stages):
        numbers = {int(name.split(".")[2]) for name in layout.local_shapes(rank) if name.startswith("decoder.layers")}
        assert numbers == set(range(layers))
    where = {holding.tensor: rank for rank in range(8) for holding in layout.holdings(rank)}
    assert where["model.layers.39.mlp.gate.weight"] == 4
    assert where["model.layers.40.mlp.gate.weight"] == 5
    with pytest.raises(ConfigError, match="pipeline_parallel=8 does not divide the model's 61 layers"):
        TrainLayout(architecture, ParallelSizes(pipeline=8), 8)


def test_tied_output_layer_is_the_embedding_on_the_last_stage() -> None:
    architecture = moe("qwen2_moe")
    layout = TrainLayout(architecture, ParallelSizes(pipeline=3), 3)
    found = [holding.local for rank in range(3) for holding in layout.holdings_of("model.embed_tokens.weight", rank)]
    assert found == ["embedding.word_embeddings.weight", "output_layer.weight"]
    assert padded_vocabulary(architecture, ParallelSizes()) == 100


def test_deepseek_v3_has_its_published_size() -> None:
    """671 B parameters without the layer of multi-token prediction, and vLLM's fused names."""
    architecture = deepseek(
        layers=61,
        dense_layers=3,
        hidden_size=7168,
        attention_heads=128,
        key_value_heads=128,
        head_dim=192,
        latent=LatentAttention(1536, 512, 128, 64, 128),
        dense_width=18432,
        experts=256,
        expert_width=2048,
        shared_expert_width=2048,
        vocabulary_size=129280,
    )
    tensors = full_tensors(architecture, Weights())
    assert round(sum(Box.of(tensor.shape).elements for tensor in tensors) / 1e9) == 671
    shapes = EngineLayout(architecture, 8, 32, True, engines=2).local_shapes(300)
    attention = "model.layers.60.self_attn."
    assert shapes[f"{attention}fused_qkv_a_proj.weight"] == (1536 + 512 + 64, 7168)
    assert shapes[f"{attention}kv_b_proj.weight"] == (128 // 8 * (128 + 128), 512)
    assert shapes["model.layers.60.mlp.experts.w13_weight"] == (1, 2 * 2048, 7168)
    # vLLM keeps these whole where expert parallel joins tensor and data parallel.
    assert shapes["model.layers.60.mlp.shared_experts.gate_up_proj.weight"] == (2 * 2048, 7168)
    assert shapes["model.layers.0.mlp.gate_up_proj.weight"] == (2 * 18432 // 8, 7168)
    split = EngineLayout(architecture, 8, 1, True).local_shapes(0)
    assert split["model.layers.60.mlp.shared_experts.down_proj.weight"] == (7168, 2048 // 8)


def test_experts_that_do_not_divide_give_the_first_ranks_one_more() -> None:
    """vLLM's linear placement: 8 experts on 3 ranks."""
    layout = EngineLayout(moe(layers=1), 1, 3, True)
    boxes = [layout.holdings_of("model.layers.0.mlp.experts.w2", rank)[0].box for rank in range(3)]
    assert [(box.start[0], box.stop[0]) for box in boxes] == [(0, 3), (3, 6), (6, 8)]


def test_key_value_heads_are_replicated_over_more_ranks_than_heads() -> None:
    layout = EngineLayout(moe(layers=1), 8, 1, False)
    boxes = [layout.holdings_of("model.layers.0.self_attn.k_proj.weight", rank)[0].box for rank in range(8)]
    assert [box.start[0] for box in boxes] == [0, 0, 1, 1, 2, 2, 3, 3]


WIDE = moe(hidden_size=256)
INT4 = Weights.chosen_by(WIDE, lambda name: get_format("w4a16", 128))
"""Rows of 128 weights in o_proj and w2: one group of them."""


@pytest.mark.parametrize(
    ("make", "key", "fix"),
    [
        (lambda: TrainLayout(WIDE, ParallelSizes(tensor=2), 2, INT4), "train.tensor_parallel=2", "smaller groups"),
        (lambda: TrainLayout(WIDE, ParallelSizes(expert_tensor=2), 2, INT4), "train.expert_tensor", "parallel to 1,"),
        (lambda: TrainLayout(moe(), ParallelSizes(tensor=8), 8), "train.tensor_parallel=8", "to 1 or 2 or 4"),
        (lambda: TrainLayout(moe(), ParallelSizes(expert=3), 3), "train.expert_parallel=3", "to 1 or 2"),
        (lambda: TrainLayout(moe(), ParallelSizes(tensor=2), 3), "does not divide the 3 workers", "divides 3"),
        (lambda: EngineLayout(WIDE, 2, 1, True, INT4), "rollout.tensor_parallel=2", "smaller groups"),
        (lambda: EngineLayout(moe(), 16, 1, True), "rollout.tensor_parallel=16", "to 1 or 2 or 4 or 8"),
    ],
)
def test_layouts_that_cut_what_belongs_together_are_refused_with_the_fix(
    make: Callable[[], Layout], key: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        make()
    assert fix in str(caught.value)
