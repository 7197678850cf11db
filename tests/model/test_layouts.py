"""Every layout holds the same model: weights and adapters bit for bit, outputs and gradients to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from tests.model import harness
from tests.ranks import run_ranks

LAYOUTS = {
    "DP2": TrainConfig(),
    "TP2": TrainConfig(tensor_parallel=2),
    "TP2 ETP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
    "EP2": TrainConfig(expert_parallel=2),
    "PP2": TrainConfig(pipeline_parallel=2),
    "TP2 EP2": TrainConfig(tensor_parallel=2, expert_parallel=2),
    "TP2 EP2 allgather": TrainConfig(tensor_parallel=2, expert_parallel=2, token_dispatcher="allgather"),
}
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")
LORA = LoraConfig(rank=4, alpha=8.0)


def _random_adapters(loaded: harness.Loaded) -> dict[str, torch.Tensor]:
    from qerl_rl.model.lora import gather_adapters

    generator = torch.Generator().manual_seed(5)
    shapes = gather_adapters(loaded.model, loaded.architecture)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.2 for name, tensor in shapes.items()}


def _one_layout(train: TrainConfig, lora: LoraConfig, folder: Path) -> dict[str, Any]:
    """What must not depend on the layout: first adapters, adapters after a round trip, export, loss, gradients."""
    harness.start(train)
    from qerl_rl.model.lora import gather_adapters, load_adapters
    from qerl_rl.model.weight_map import export_hf

    loaded = harness.load(folder, train, lora)
    model, architecture = loaded.model, loaded.architecture
    found: dict[str, Any] = {"first": gather_adapters(model, architecture)}
    load_adapters(model, architecture, _random_adapters(loaded))
    found["adapters"] = gather_adapters(model, architecture)
    found["base"] = dict(export_hf(model, architecture))
    found["merged"] = dict(export_hf(model, architecture, merge_adapters=True))
    found["loss"] = harness.loss_and_gradients(loaded, harness.sequences(architecture.vocabulary_size))
    found["gradients"] = harness.summed_gradients(loaded)
    return {name: _shareable(value) for name, value in found.items()}


def _shareable(value: Any) -> Any:
    # Tensors would go through shared memory, which ends with the process that made it.
    return {name: tensor.numpy() for name, tensor in value.items()} if isinstance(value, dict) else value


def _all_layouts(layouts: list[TrainConfig], lora: LoraConfig, folder: Path) -> list[dict[str, Any]]:
    return [_one_layout(train, lora, folder) for train in layouts]


def _assert_same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        difference = abs(found[name] - array).max()
        assert difference <= tolerance * abs(array).max(), f"{name}: {difference}"


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_hold_the_same_model_and_give_the_same_gradients(family: str, tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8(family, layers=2)
    [[expected]] = run_ranks(_all_layouts, 1, [TrainConfig()], LORA, folder)
    results = run_ranks(_all_layouts, 2, list(LAYOUTS.values()), LORA, folder)
    for number, name in enumerate(LAYOUTS):
        first, second = (rank[number] for rank in results)
        for kind in ("first", "adapters"):
            _assert_same(first[kind], expected[kind])
            _assert_same(second[kind], expected[kind])
        _assert_same(first["base"], expected["base"])
        assert second["base"] == {}
        _assert_same(first["merged"], expected["merged"], 1e-6)
        assert max(first["loss"], second["loss"]) == pytest.approx(expected["loss"], rel=1e-6), name
        _assert_same(first["gradients"], expected["gradients"], 2e-5)
