"""Every layout holds the same model: weights and adapters bit for bit, outputs and gradients to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.layout.blocks import ParallelSizes
from tests.layout.full_weights import full_weights
from tests.model import harness
from tests.ranks import RankPool, run_ranks

LAYOUTS = {
    "DP2": TrainConfig(),
    "TP2": TrainConfig(tensor_parallel=2),
    "TP2 ETP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
    "EP2": TrainConfig(expert_parallel=2),
    "PP2": TrainConfig(pipeline_parallel=2),
    "TP2 EP2": TrainConfig(tensor_parallel=2, expert_parallel=2),
    "TP2 EP2 allgather": TrainConfig(tensor_parallel=2, expert_parallel=2, token_dispatcher="allgather"),
}
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "phimoe", "minicpm")
LORA = LoraConfig(rank=4, alpha=8.0)


def _one_layout(train: TrainConfig, lora: LoraConfig, folder: Path) -> dict[str, Any]:
    """What must not depend on the layout: first adapters, adapters after a round trip, export, loss, gradients."""
    harness.start(train)
    from qerl_rl.model.lora import gather_adapters
    from qerl_rl.model.weight_map import export_hf

    loaded = harness.load(folder, train, lora)
    model, architecture = loaded.model, loaded.architecture
    found: dict[str, Any] = {"first": gather_adapters(model, architecture)}
    harness.set_random_adapters(loaded)
    found["adapters"] = gather_adapters(model, architecture)
    found["misplaced"] = _misplaced(loaded, train, found["adapters"])
    found["base"] = dict(export_hf(model, architecture))
    found["merged"] = dict(export_hf(model, architecture, merge_adapters=True))
    found["loss"] = harness.loss_and_gradients(loaded, harness.sequences(architecture.vocabulary_size))
    found["gradients"] = harness.summed_gradients(loaded)
    return {name: _shareable(value) for name, value in found.items()}


def _misplaced(loaded: harness.Loaded, train: TrainConfig, adapters: dict[str, torch.Tensor]) -> list[str]:
    """Tensors of this rank's model that the layout shapes or fills otherwise, and its place if it has another."""
    from qerl_rl.layout.slots import find_tensor
    from qerl_rl.layout.tensors import Adapters, Weights, full_tensors
    from qerl_rl.layout.train import TrainLayout, coordinates
    from qerl_rl.model.parallel import current_coordinates, parallel_sizes

    world, here, sizes = torch.distributed.get_world_size(), current_coordinates(), parallel_sizes(train)
    found = [] if coordinates(here.rank, sizes, world) == here else [str(here)]
    weights = Weights.chosen_by(loaded.architecture, loaded.reader.format_of, torch.float32)
    full = full_weights(loaded.reader, loaded.architecture, weights)
    for tensor in full_tensors(loaded.architecture, Adapters(LORA)):
        exchanged, _, kind = tensor.name.partition(":")
        value, heads = adapters[exchanged], loaded.architecture.query_size
        if kind:
            rows = [heads, loaded.architecture.key_value_size, loaded.architecture.key_value_size]
            value = value.split(rows)["qkv".index(kind)]
        full[tensor.name] = value.reshape(tensor.shape)
    for tensors in (weights, Adapters(LORA)):
        layout = TrainLayout(loaded.architecture, sizes, world, tensors)
        shapes = layout.local_shapes(here.rank)
        found += [name for name, shape in shapes.items() if find_tensor(loaded.model, name).shape != shape]
        for holding in layout.holdings(here.rank):
            mine = holding.take(find_tensor(loaded.model, holding.local))
            if not torch.equal(mine, full[holding.tensor][holding.box.slices]):
                found.append(f"{holding.tensor} in {holding.local}")
    return found


def _shareable(value: Any) -> Any:
    # Tensors would go through shared memory, which ends with the process that made it.
    return {name: tensor.numpy() for name, tensor in value.items()} if isinstance(value, dict) else value


def _route_to_first_experts(model: Any) -> None:
    """Send every token to experts 0 and 1, so that a rank with other experts gets none."""
    for layer in model.decoder.layers:
        router = layer.mlp.router

        def routing(logits: torch.Tensor, experts: int = router.num_experts) -> tuple[torch.Tensor, torch.Tensor]:
            flat = logits.view(-1, experts)
            probabilities = torch.zeros_like(flat)
            probabilities[:, :2] = flat[:, :2].softmax(-1)
            return probabilities, torch.arange(experts).lt(2).expand_as(flat).contiguous()

        router.routing = routing


def _megatron_groups(cases: list[tuple[ParallelSizes, int]]) -> list[bool]:
    """Whether ranks that differ in one coordinate alone are one group of Megatron's, for each case."""
    harness.start(TrainConfig())
    from megatron.core.parallel_state import RankGenerator

    from qerl_rl.layout.train import coordinates

    agree = []
    for sizes, world in cases:
        expert_data = world // (sizes.pipeline * sizes.expert * sizes.expert_tensor)
        data = world // (sizes.tensor * sizes.pipeline)
        order, places = "tp-cp-ep-dp-pp", [coordinates(rank, sizes, world) for rank in range(world)]
        dense = RankGenerator(sizes.tensor, 1, data, sizes.pipeline, 1, order)
        experts = RankGenerator(sizes.expert_tensor, sizes.expert, expert_data, sizes.pipeline, 1, order)
        dense_fields = {"tp": "tensor", "dp": "data", "pp": "pipeline"}
        expert_fields = {"tp": "expert_tensor", "ep": "expert", "dp": "expert_data", "pp": "pipeline"}
        for generator, fields in ((dense, dense_fields), (experts, expert_fields)):
            for token, field in fields.items():
                others = [name for name in fields.values() if name != field]
                groups: dict[tuple[int, ...], list[int]] = {}
                for at in sorted(places, key=lambda at: getattr(at, field)):
                    groups.setdefault(tuple(getattr(at, name) for name in others), []).append(at.rank)
                agree.append(sorted(groups.values()) == sorted(generator.get_ranks(token)))
    return agree


def test_coordinates_are_those_that_megatron_deals_out(one_rank: RankPool) -> None:
    cases = [
        (ParallelSizes(2, 2, 2, 1), 16),
        (ParallelSizes(4, 2, 2, 4), 32),
        (ParallelSizes(1, 8, 32, 1), 512),
        (ParallelSizes(4, 2, 16, 1), 128),
        (ParallelSizes(2, 1, 3, 2), 12),
    ]
    [agree] = one_rank(_megatron_groups, cases)
    assert agree == [True] * 7 * len(cases)


def _with_idle_experts(train: TrainConfig, folder: Path) -> dict[str, Any]:
    harness.start(train)
    loaded = harness.load(folder, train, LORA)
    harness.set_random_adapters(loaded)
    _route_to_first_experts(loaded.model)
    harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
    return _shareable(harness.summed_gradients(loaded))


def _all_layouts(layouts: list[TrainConfig], lora: LoraConfig, folder: Path) -> list[dict[str, Any]]:
    return [_one_layout(train, lora, folder) for train in layouts]


def _assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        difference = abs(found[name] - array).max()
        assert difference <= tolerance * abs(array).max(), f"{name}: {difference}"


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_hold_the_same_model_and_give_the_same_gradients(
    family: str, tiny_w8a8: Callable[..., Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = tiny_w8a8(family, layers=2)
    [[expected]] = one_rank(_all_layouts, [TrainConfig()], LORA, folder)
    results = two_ranks(_all_layouts, list(LAYOUTS.values()), LORA, folder)
    for number, name in enumerate(LAYOUTS):
        first, second = (rank[number] for rank in results)
        for kind in ("first", "adapters"):
            _assert_same(first[kind], expected[kind])
            _assert_same(second[kind], expected[kind])
        assert first["misplaced"] == second["misplaced"] == [], name
        _assert_same(first["base"], expected["base"])
        assert second["base"] == {}
        _assert_same(first["merged"], expected["merged"], 1e-6)
        assert max(first["loss"], second["loss"]) == pytest.approx(expected["loss"], rel=1e-6), name
        _assert_same(first["gradients"], expected["gradients"], 2e-5)


def test_pipeline_stages_of_unequal_length_give_the_same_gradients(
    tiny_w8a8: Callable[..., Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = tiny_w8a8("deepseek_v2", layers=3, top_k=3)
    layouts = [TrainConfig(pipeline_parallel=2, layers_per_stage=stages) for stages in ("2,1", "1,2")]
    [[expected]] = one_rank(_all_layouts, [TrainConfig()], LORA, folder)
    for first, second in zip(*two_ranks(_all_layouts, layouts, LORA, folder), strict=True):
        assert first["misplaced"] == second["misplaced"] == []
        _assert_same(first["base"], expected["base"])
        assert max(first["loss"], second["loss"]) == pytest.approx(expected["loss"], rel=1e-6)
        _assert_same(first["gradients"], expected["gradients"], 2e-5)


def test_experts_split_both_ways_over_four_ranks_give_the_same_gradients(
    tiny_w8a8: Callable[..., Path], one_rank: RankPool
) -> None:
    folder = tiny_w8a8("qwen2_moe", layers=2)
    layout = TrainConfig(tensor_parallel=2, expert_parallel=2, expert_tensor_parallel=2)
    [[expected]] = one_rank(_all_layouts, [TrainConfig()], LORA, folder)
    [first], *others = run_ranks(_all_layouts, 4, [layout], LORA, folder)
    assert all(rank["misplaced"] == [] for rank in (first, *(other for [other] in others)))
    _assert_same(first["base"], expected["base"])
    _assert_same(first["gradients"], expected["gradients"], 2e-5)


def test_rank_without_tokens_gives_zero_gradients_and_the_others_theirs(
    tiny_w8a8: Callable[..., Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = tiny_w8a8("qwen3_moe", layers=2)
    [expected] = one_rank(_with_idle_experts, TrainConfig(), folder)
    idle = expected["model.layers.0.mlp.experts.w13.lora_A"][2:]
    assert idle.size > 0
    assert not idle.any()
    for layout in ("EP2", "TP2 EP2"):
        found, _ = two_ranks(_with_idle_experts, LAYOUTS[layout], folder)
        _assert_same(found, expected, 2e-5)
