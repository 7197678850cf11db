"""Full tensors, layouts of up to 16 ranks and the memory of their ranks, all in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.families.deepseek import NAMES
from qerl_rl.layout.holdings import FullTensor, Holding, Layout
from qerl_rl.layout.parts import LatentAttention
from qerl_rl.layout.routing import SIGMOID, RoutingRule
from qerl_rl.layout.tensors import Adapters, Tensors, Weights
from qerl_rl.layout.train import TrainLayout
from qerl_rl.quant.formats import get_format
from qerl_rl.reshard.plan import Plan, RankPlan

Memory = dict[str, torch.Tensor]
"""A rank's tensors by their local names."""


def moe(family: str = "qwen3_moe", **sizes: Any) -> MoeArchitecture:
    """A small model: 4 query heads of 8 over 2 key-value heads, 8 experts, widths that int4 in groups of 32 divides."""
    has_shared = family == "qwen2_moe"
    fields = {
        "layers": 3,
        "hidden_size": 64,
        "attention_heads": 8,
        "key_value_heads": 4,
        "head_dim": 16,
        "experts": 8,
        "experts_per_token": 2,
        "expert_width": 128,
        "shared_expert_width": 128 if has_shared else 0,
        "vocabulary_size": 100,
        "max_positions": 64,
        "norm_eps": 1e-6,
        "rope_theta": 1e4,
        "normalized_top_k": True,
        "qk_norm": family == "qwen3_moe",
        "qkv_bias": has_shared,
        "tied_embeddings": has_shared,
    }
    return MoeArchitecture(family=family, **(fields | sizes))  # type: ignore[arg-type]


def deepseek(query_rank: int | None = 32, **sizes: Any) -> MoeArchitecture:
    """DeepSeek-V3 in small: one dense layer, then MoE layers."""
    fields = {
        "key_value_heads": 8,
        "head_dim": 24,
        "shared_expert_width": 128,
        "qk_norm": False,
        "shared_expert_gate": False,
        "latent": LatentAttention(query_rank, 24, nope_head_dim=16, rope_head_dim=8, value_head_dim=16),
        "rule": RoutingRule(top_k=2, scores=SIGMOID, has_bias=True),
        "dense_layers": 1,
        "dense_width": 128,
        "names": NAMES,
    }
    return moe("deepseek_v3", **(fields | sizes))


ARCHITECTURES: list[MoeArchitecture] = [
    *map(moe, ("qwen3_moe", "qwen2_moe", "mixtral")),
    moe(experts=12),
    deepseek(),
    deepseek(None),
]


@st.composite
def tensors_of(draw: st.DrawFn, architecture: MoeArchitecture) -> Tensors:
    """Weights in bfloat16, int8 or packed int4 (experts or all of them), or adapters."""
    kind = draw(st.sampled_from(["bfloat16", "w8a8", "w4a16", "int4 experts"]))
    if draw(st.booleans()):
        return Adapters(LoraConfig(rank=4, shared_experts=True))
    if kind == "bfloat16":
        return Weights()
    if architecture.latent and kind != "w8a8":
        kind = "int4 experts"  # Its ranks of 32 and 24 can't be split in groups of 32.
    format = get_format("w8a8") if kind == "w8a8" else get_format("w4a16", 32)
    return Weights.chosen_by(architecture, lambda name: format if "experts" in name or "int4" not in kind else None)


@st.composite
def train_layouts(draw: st.DrawFn, architecture: MoeArchitecture, tensors: Tensors, world_size: int) -> TrainLayout:
    """Any sizes that divide the model and the ranks, 3 layers on 2 stages too."""
    stages = draw(_size(world_size, most=3))
    in_stage = world_size // stages
    tensor = draw(_size(in_stage, divides=4))
    expert_tensor = draw(st.sampled_from([1, tensor]))
    expert = draw(_size(in_stage // expert_tensor, divides=architecture.experts))
    layers = (2, 1) if stages == 2 else ()
    return TrainLayout(architecture, ParallelSizes(tensor, stages, expert, expert_tensor, layers), world_size, tensors)


@st.composite
def engine_layouts(draw: st.DrawFn, architecture: MoeArchitecture, tensors: Tensors, world_size: int) -> EngineLayout:
    """Tensor parallel up to as many ranks as heads (more than key-value heads), one engine or several.

    Rows of 128 in groups of 32 split four ways.
    """
    quantized = isinstance(tensors, Weights) and any(format.group_size for format in tensors.formats.values())
    tensor = draw(_size(world_size, divides=4 if quantized else 8))
    data = draw(_size(world_size // tensor))
    return EngineLayout(architecture, tensor, data, draw(st.booleans()), tensors, world_size // (tensor * data))


def _size(number: int, *, divides: int = 0, most: int = 16) -> st.SearchStrategy[int]:
    """A divisor of the number of ranks, and of what is split (0: of all)."""
    return st.sampled_from([size for size in range(1, most + 1) if number % size == 0 and divides % size == 0])


def random_full(tensors: Sequence[FullTensor], seed: int = 0) -> Memory:
    """Every full tensor, of random bits."""
    generator = torch.Generator().manual_seed(seed)
    full = {}
    for tensor in tensors:
        *rows, columns = tensor.shape
        shape = (*rows, columns * tensor.dtype.itemsize)
        bits = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        full[tensor.name] = bits.view(tensor.dtype)
    return full


def sliced(layout: Layout, full: Memory, rank: int) -> Memory:
    """What a rank holds of the full tensors; zeros where it holds none (the padding of a vocabulary)."""
    dtypes = {holding.local: full[holding.tensor].dtype for holding in layout.holdings(rank)}
    shapes = layout.local_shapes(rank)
    local = {name: torch.zeros(shape, dtype=dtypes.get(name, torch.float32)) for name, shape in shapes.items()}
    for holding in layout.holdings(rank):
        holding.take(local[holding.local]).copy_(full[holding.tensor][holding.box.slices])
    return local


def same_bits(left: Memory, right: Memory) -> bool:
    """Whether both ranks hold the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(
        tensor.shape == right[name].shape and torch.equal(tensor.view(torch.uint8), right[name].view(torch.uint8))
        for name, tensor in left.items()
    )


def execute(plan: Plan, memories: Sequence[Memory]) -> list[Memory]:
    """What the ranks hold after a plan, by plain indexing, each rank acting on its own part alone.

    A source that is finished is gone; a target that is complete must not change any more, and each gets complete.
    """
    parts = [plan.for_rank(rank) for rank in range(plan.world_size)]
    left = [dict(memory) for memory in memories]
    filling = [empty(plan, rank) for rank in range(plan.world_size)]
    complete: list[Memory] = [{} for _ in parts]
    for number in range(plan.bucket_count):
        buckets = [part.buckets[number] for part in parts]
        for rank, bucket in enumerate(buckets):
            for copy in bucket.copies:
                _copy(copy.target, filling[rank], copy.source, left[rank])
            for peer, received in bucket.receives.items():
                for target, source in zip(received, buckets[peer].sends[rank], strict=True):
                    _copy(target, filling[rank], source, left[peer])
            assert set(buckets[rank].sends) == {peer for peer, other in enumerate(buckets) if rank in other.receives}
        for rank, bucket in enumerate(buckets):
            for name in bucket.finished_sources:
                del left[rank][name]
            for name in bucket.complete_targets:
                complete[rank][name] = filling[rank].pop(name)
    assert not any(left)
    assert not any(filling)
    return complete


def _copy(target: Holding, targets: Memory, source: Holding, sources: Memory) -> None:
    assert (target.tensor, target.box) == (source.tensor, source.box)
    target.take(targets[target.local]).copy_(source.take(sources[source.local]))


def empty(plan: Plan, rank: int) -> Memory:
    """A rank's tensors of the target, zero."""
    dtypes = {tensor.name: tensor.dtype for tensor in plan.tensors}
    of_local = {holding.local: dtypes[holding.tensor] for holding in plan.target.holdings(rank)}
    shapes = plan.target.local_shapes(rank)
    return {name: torch.zeros(shape, dtype=of_local.get(name, torch.float32)) for name, shape in shapes.items()}


def bytes_of_bucket(part: RankPlan, bucket: int) -> tuple[int, int]:
    """Bytes that a rank sends and receives, and that it copies, in one bucket."""
    found = part.buckets[bucket]

    def size(holdings: Sequence) -> int:
        return sum(holding.box.elements * part.dtypes[holding.tensor].itemsize for holding in holdings)

    travel = sum(size(each) for side in (found.sends, found.receives) for each in side.values())
    return travel, size([copy.source for copy in found.copies])
