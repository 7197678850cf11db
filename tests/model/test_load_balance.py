"""The balancing loss and its gradient are those of transformers, whatever it is added to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import TrainConfig
from tests.model import harness
from tests.model.test_hf_parity import hf_model
from tests.model.test_routing_replay import random_experts
from tests.ranks import RankPool

COEFFICIENT, WEIGHT = 0.3, 7


def _compare(folder: Path) -> dict[str, Any]:
    """Of a model with one layer, and with the policy's loss in front: what the balancing loss adds to the gradients."""
    train = TrainConfig(recompute="full")
    harness.start(train)
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from qerl_rl.model.forced_experts import ForcedExperts
    from qerl_rl.model.load_balance import LoadBalance
    from qerl_rl.model.routing_replay import RoutedSequences

    loaded = harness.load(folder, train)
    shape = loaded.architecture
    tokens = harness.sequences(shape.vocabulary_size)
    count = sum(map(len, tokens))
    experts = random_experts(count, shape.layers, shape.experts, shape.experts_per_token)
    # What the schedule does that this test leaves out.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    gate = loaded.model.decoder.layers[0].mlp.router.weight

    def gradient(balance: LoadBalance | None, forced: ForcedExperts | None) -> torch.Tensor:
        arguments = harness.packed(tokens)
        arguments["packed_seq_params"] = RoutedSequences(forced, balance, **vars(arguments["packed_seq_params"]))
        gate.grad = None
        loaded.model(**arguments)[0].square().mean().backward()
        return gate.grad.clone()

    found: dict[str, Any] = {}
    for name, forced in (("own", None), ("forced", ForcedExperts(experts, torch.ones(count, dtype=torch.bool)))):
        balance = LoadBalance(COEFFICIENT, WEIGHT, count)
        found[name] = (gradient(balance, forced) - gradient(None, forced)).numpy(), float(balance.losses[0])
    oracle = hf_model(folder)
    outputs = [oracle(sequence[None], output_router_logits=True) for sequence in tokens]
    logits = torch.cat([output.router_logits[0] for output in outputs])
    # transformers sums over the k experts of a token where Megatron takes their mean.
    loss = load_balancing_loss_func((logits,), shape.experts, shape.experts_per_token) / shape.experts_per_token
    (loss * COEFFICIENT * WEIGHT).backward()
    expected = oracle.model.layers[0].mlp.gate.weight
    found["transformers"] = expected.grad.clone().numpy(), float(loss)
    return found


@pytest.fixture(scope="module")
def compared(tiny_checkpoint: Callable[..., Path], one_rank: RankPool) -> dict[str, Any]:
    return one_rank(_compare, tiny_checkpoint("mixtral", layers=1))[0]


def test_loss_and_gradient_of_the_router_equal_transformers(compared: dict[str, Any]) -> None:
    (gradient, loss), (expected_gradient, expected) = compared["own"], compared["transformers"]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert abs(expected_gradient).max() > 1e-3
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * abs(expected_gradient).max())


def test_replayed_experts_are_the_ones_that_are_balanced(compared: dict[str, Any]) -> None:
    # The random experts are spread evenly, so the loss is near that of equally busy experts, which is 1.
    assert abs(compared["forced"][1] - 1) < abs(compared["own"][1] - 1) / 2
    assert abs(compared["forced"][0] - compared["own"][0]).max() > 1e-3
