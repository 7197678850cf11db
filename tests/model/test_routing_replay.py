"""Forced experts in the Megatron model compute what transformers computes when its routers are forced to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import TrainConfig
from tests.model import harness
from tests.model.test_hf_parity import CASES, hf_logits, hf_model
from tests.ranks import RankPool


def random_experts(tokens: int, layers: int, experts: int, top_k: int) -> torch.Tensor:
    """uint8 [tokens, layers, top_k], distinct for each token and layer."""
    generator = torch.Generator().manual_seed(7)
    return torch.rand(tokens, layers, experts, generator=generator).argsort(-1)[..., :top_k].to(torch.uint8)


def moe_layers(model: Any) -> list[tuple[int, Any]]:
    return [(number, layer) for number, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def force_transformers(model: Any, experts: list[torch.Tensor], normalized: bool) -> None:
    """Make the routers choose `experts` [tokens, layers, k] of one sequence after the other, with their own weights."""
    scaling = getattr(model.config, "routed_scaling_factor", 1.0)
    for number, layer in moe_layers(model):
        rows = iter([own[:, number].long() for own in experts])

        def forward(hidden: torch.Tensor, gate: Any = layer.mlp.gate, rows: Any = rows) -> tuple[torch.Tensor, ...]:
            logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
            chosen = next(rows)
            scores = logits.sigmoid() if hasattr(gate, "e_score_correction_bias") else logits.softmax(-1)
            weights = scores.gather(1, chosen)
            return logits, scaling * (weights / weights.sum(-1, keepdim=True) if normalized else weights), chosen

        layer.mlp.gate.forward = forward


def compare(folder: Path) -> dict[str, np.ndarray]:
    train = TrainConfig()
    harness.start(train)
    from qerl_rl.model.forced_experts import ForcedExperts
    from qerl_rl.model.routing_replay import RoutedSequences

    loaded = harness.load(folder, train)
    shape = loaded.architecture
    tokens = harness.sequences(shape.vocabulary_size)
    lengths = [len(sequence) for sequence in tokens]
    experts = random_experts(sum(lengths), shape.layers, shape.experts, shape.experts_per_token)
    arguments = harness.packed(tokens)
    free = loaded.model(**arguments)[0]
    forced = ForcedExperts(experts, torch.ones(sum(lengths), dtype=torch.bool))
    arguments["packed_seq_params"] = RoutedSequences(forced, **vars(arguments["packed_seq_params"]))
    logits = loaded.model(**arguments)[0]
    logits.square().sum().backward()
    oracle = hf_model(folder)
    force_transformers(oracle, list(experts.split(lengths)), shape.normalized_top_k)
    expected = hf_logits(oracle, tokens)
    expected.square().sum().backward()
    own = loaded.model.decoder.layers
    gates = [own[number].mlp.router.weight.grad for number, _ in moe_layers(oracle)]
    found = {
        "free": free,
        "found": logits,
        "expected": expected,
        "gates found": torch.stack(gates),
        "gates expected": torch.stack([layer.mlp.gate.weight.grad for _, layer in moe_layers(oracle)]),
    }
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def compare_all(folders: dict[str, Path]) -> dict[str, dict[str, np.ndarray]]:
    return {case: compare(folder) for case, folder in folders.items()}


@pytest.fixture(scope="module")
def comparisons(tiny_checkpoint: Callable[..., Path], one_rank: RankPool) -> dict[str, dict[str, np.ndarray]]:
    folders = {case: tiny_checkpoint(family, **sizes) for case, (family, sizes) in CASES.items()}
    return one_rank(compare_all, folders)[0]


@pytest.mark.parametrize("case", CASES)
def test_forced_experts_equal_transformers_forced_to_them(
    case: str, comparisons: dict[str, dict[str, np.ndarray]]
) -> None:
    seen = comparisons[case]
    scale = abs(seen["expected"]).max()
    np.testing.assert_allclose(seen["found"], seen["expected"], atol=1e-5 * scale)
    gates = seen["gates expected"]
    assert abs(gates).max() > 0
    np.testing.assert_allclose(seen["gates found"], gates, atol=1e-4 * abs(gates).max())
    # The random experts are others than the routers' own.
    assert abs(seen["free"] - seen["found"]).max() > 0.1 * scale
