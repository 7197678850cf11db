"""Tokens that are sent to given experts: nothing changes with the routers' own, and with others every layout agrees."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import RouterReplayConfig
from qerl_rl.train.samples import Samples
from tests.ranks import RankPool
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYERS, EXPERTS, TOP_K = 2, 8, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 2": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
    "expert 2": {"expert_parallel": 2},
    "pipeline 2, recompute full": {"pipeline_parallel": 2, "recompute": "full"},
    "pipeline 2, recompute selective": {"pipeline_parallel": 2, "recompute": "selective"},
    "tensor 2, expert 2, allgather, recompute selective": {
        "tensor_parallel": 2, "expert_parallel": 2, "recompute": "selective", "token_dispatcher": "allgather",
    },
    "tensor 2, alltoall_seq": {
        "tensor_parallel": 2, "expert_tensor_parallel": 2, "token_dispatcher": "alltoall_seq",
    },
}  # fmt: skip
SIZES = {"micro_batch_tokens": 40, "quant": "none", "rank": 0, "learning_rate": 0.0}
"""Several micro-batches are on their way in a pipeline; everything trains, routers too, but by nothing."""


def routed(samples: Samples, experts: list[np.ndarray]) -> Samples:
    return dataclasses.replace(samples, routed_experts=experts)


def random_experts(samples: Samples) -> list[np.ndarray]:
    """Experts for every token but the last; for none of every fifth sample, and for half of another's tokens."""
    generator = np.random.default_rng(8)
    rows = []
    for index, length in enumerate(samples.lengths):
        known = 0 if index % 5 == 4 else (length - 1) // 2 if index % 5 == 3 else length - 1
        scores = generator.random((known, LAYERS, EXPERTS))
        rows.append(scores.argsort(-1)[..., :TOP_K].astype(np.uint8))
    return rows


def own_experts(engine: Any, samples: Samples) -> list[np.ndarray]:
    """What the routers of an engine of one rank choose by themselves, larger weights first; not for the last token."""
    seen: list[torch.Tensor] = []
    routers = [layer.mlp.router for layer in engine.model.decoder.layers]
    hooks = [
        router.register_forward_hook(lambda module, inputs, output: seen.append(output[0].topk(TOP_K).indices))
        for router in routers
    ]
    rows = []
    for index in range(len(samples)):
        seen.clear()
        engine.log_probs(samples.select([index]))
        rows.append(torch.stack(seen, dim=1)[: samples.lengths[index] - 1].numpy().astype(np.uint8))
    for hook in hooks:
        hook.remove()
    return rows


def passes(engine: Any, samples: Samples) -> dict[str, Any]:
    """Scores, and an update that moves nothing, of this rank's share."""
    own = share(samples, engine.data_parallel_rank, engine.data_parallel_size)
    scores = engine.log_probs(own)
    update = engine.update(own, policy_gradient)
    gates = [layer.mlp.router.weight.main_grad.norm().item() for layer in engine.model.decoder.layers]
    return {
        "data rank": engine.data_parallel_rank,
        "log_probs": None if scores is None else np.concatenate(scores.log_probs),
        "entropy": None if scores is None else np.concatenate(scores.entropy),
        "metrics": None if scores is None else scores.router_replay,
        "update": update,
        "gates": gates,
    }


def config(paths: dict[str, str], workers: int, **settings: Any) -> Any:
    found = make_config(paths, workers=workers, **(SIZES | settings))
    return dataclasses.replace(found, router_replay=RouterReplayConfig(mode="R3"))


def alone(paths: dict[str, str]) -> dict[str, Any]:
    samples = make_samples()
    engine = start_engine(config(paths, 1))
    own = own_experts(engine, samples)
    flipped = [rows[..., ::-1].copy() for rows in own]
    return {
        "own experts": own,
        "free": passes(engine, samples),
        "own": passes(engine, routed(samples, own)),
        "flipped": passes(engine, routed(samples, flipped)),
        "others": passes(engine, routed(samples, random_experts(samples))),
    }


def together(paths: dict[str, str], own: list[np.ndarray]) -> dict[str, dict[str, Any]]:
    samples, found = make_samples(), {}
    for name, settings in LAYOUTS.items():
        engine = start_engine(config(paths, 2, **settings))
        found[name] = {
            "free": passes(engine, samples),
            "own": passes(engine, routed(samples, own)),
            "others": passes(engine, routed(samples, random_experts(samples))),
        }
    return found


@pytest.fixture(scope="module")
def one(one_rank: RankPool, checkpoints: dict[str, str]) -> dict[str, Any]:
    return one_rank(alone, checkpoints)[0]


@pytest.fixture(scope="module")
def two(two_ranks: RankPool, checkpoints: dict[str, str], one: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    return two_ranks(together, checkpoints, one["own experts"])


def assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    np.testing.assert_equal({**found, "metrics": None}, {**expected, "metrics": None})


def test_the_routers_own_experts_change_no_bit(one: dict[str, Any], two: list[dict[str, dict[str, Any]]]) -> None:
    assert_same_bits(one["own"], one["free"])
    assert one["free"]["metrics"] == {"router_replay/missing": 1.0, "router_replay/changed": 0.0}
    assert one["own"]["metrics"] == {"router_replay/missing": 0.0, "router_replay/changed": 0.0}
    for rank in two:
        for case in LAYOUTS:
            assert_same_bits(rank[case]["own"], rank[case]["free"])


def test_the_order_of_a_tokens_experts_says_nothing(one: dict[str, Any]) -> None:
    np.testing.assert_allclose(one["flipped"]["log_probs"], one["free"]["log_probs"], atol=1e-5)
    assert one["flipped"]["metrics"]["router_replay/changed"] == 0.0


def test_other_experts_change_the_scores_and_routers_learn_how_much_each_counts(one: dict[str, Any]) -> None:
    difference = np.abs(one["others"]["log_probs"] - one["free"]["log_probs"])
    # Samples without experts are as before.
    assert np.median(difference) > 0.1
    assert difference.min() < 1e-5
    assert min(one["others"]["gates"]) > 1e-3
    samples = make_samples()
    rows = random_experts(samples)
    predicting = [
        np.arange(length - response - 1, length - 1) >= len(own)
        for length, response, own in zip(samples.lengths, samples.response_lengths, rows, strict=True)
    ]
    missing = np.concatenate(predicting).mean()
    assert one["others"]["metrics"]["router_replay/missing"] == pytest.approx(missing)
    # Two experts out of eight at random are the router's own two in one case of 28.
    assert one["others"]["metrics"]["router_replay/changed"] == pytest.approx(27 / 28, abs=0.03)


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_sends_tokens_to_the_same_experts(
    one: dict[str, Any], two: list[dict[str, dict[str, Any]]], case: str
) -> None:
    expected = one["others"]
    outputs = {
        rank[case]["others"]["data rank"]: rank[case]["others"] for rank in two if rank[case]["others"]["metrics"]
    }
    for name in ("log_probs", "entropy"):
        found = np.concatenate([outputs[rank][name] for rank in sorted(outputs)])
        np.testing.assert_allclose(found, expected[name], atol=1e-4)
    for rank in two:
        assert rank[case]["others"]["update"] == pytest.approx(expected["update"], rel=1e-5)
        assert min(rank[case]["others"]["gates"]) > 0
    for output in outputs.values():
        assert output["metrics"] == pytest.approx(expected["metrics"])
