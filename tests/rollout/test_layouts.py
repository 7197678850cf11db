"""The layouts against one rank, with adapters in every layer: tensor parallel, and data parallel x expert parallel."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qerl_rl.config.schema import LoraConfig
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.noise import Noise
from qerl_rl.quant.requantize import Survival
from tests.ranks import run_engines
from tests.rollout.scenes import (
    LORA,
    Plain,
    act_beside_the_weights,
    generate,
    hf_log_probs,
    hf_model,
    log_prob_gaps,
    log_probs_of,
    make_engine,
    plain,
    random_adapters,
    request,
    tokens_of,
)
from tests.rollout.shards import check_shards, merged_weights
from tests.shared_memory import held

GROUPS = [0, 1, 2, 3, 4]
Shares = list[list[int]]
"""The groups of each rank."""


def _scene(folder: Path, layout: dict[str, Any], calls: list[Shares], greedy_share: Shares) -> dict[str, Any]:
    rank, merging = int(os.environ["RANK"]), dataclasses.replace(LORA, in_rollout="merge")
    engine = make_engine(folder, merging, record_routing=True, **layout)
    adapters = random_adapters(folder, seed=1)
    seen: dict[str, Any] = {"held merged": engine.held_bytes(), "read": engine._plan.reader.bytes_read}
    seen["merged weights"] = merged_weights(engine, adapters, 7)
    seen["survival"], seen["merged"] = engine.survival, generate(engine, greedy_share[rank], greedy=True)
    engine.set_adapters({name: 0 * tensor for name, tensor in adapters.items()}, 8)
    act_beside_the_weights(engine)
    engine.set_adapters(adapters)
    seen["sampled"] = [generate(engine, shares[rank]) for shares in calls]
    outputs = list(engine.generate([request(group) for group in greedy_share[rank]], greedy=True))
    seen["greedy"] = plain(outputs)
    seen["routed"] = {(o.group, index): rows for o in outputs for index, rows in enumerate(o.routed_experts or [])}
    engine.set_noise(Noise(0.05, seed=3, step=1))
    seen["noise"] = generate(engine, greedy_share[rank], greedy=True)
    seen["held"] = engine.held_bytes()
    seen["named memory"], seen["unnamed memory"] = held()
    return seen


def _with_and_without_experts(folder: Path, layout: dict[str, Any]) -> Plain:
    engine = make_engine(folder, LoraConfig(rank=LORA.rank, alpha=LORA.alpha, experts=False), **layout)
    adapters = random_adapters(folder, seed=1)
    engine.set_adapters({name: tensor for name, tensor in adapters.items() if ".experts." not in name})
    return generate(engine, GROUPS, greedy=True)


def routing_agreement(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Of the prompts' tokens and layers, the share that two engines sent to the same experts."""
    same = []
    for sample, rows in left["routed"].items():
        prompt = len(request(sample[0]).prompt_tokens)
        pair = [np.sort(experts[:prompt], -1) for experts in (rows, right["routed"][sample])]
        same.append((pair[0] == pair[1]).all(-1).ravel())
    return float(np.concatenate(same).mean())


def _merged(outputs: list[Plain]) -> Plain:
    return {group: entry for output in outputs for group, entry in output.items()}


def _check_merge(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Each weight is rounded as on one rank, and counted once: the same bits; the same sums, in another order."""
    total = Survival()
    for rank in ranks:
        check_shards(rank["merged weights"], alone["merged weights"])
        total.add(rank["survival"])
    assert total.applied == pytest.approx(alone["survival"].applied, rel=1e-5)
    assert total.wanted == pytest.approx(alone["survival"].wanted, rel=1e-5)
    # By independent rounding of changes of the order of a step, 380,000 of them.
    assert total.ratio == pytest.approx(1.0, abs=0.01)


def _bytes_beside_experts(folder: Path) -> int:
    with CheckpointReader(folder) as reader:
        return sum(reader.get(name).nbytes for name in reader if ".experts." not in name)


@pytest.fixture(scope="module")
def folder(tiny_w8a8: Callable[..., Path]) -> Path:
    return tiny_w8a8("qwen3_moe", "bfloat16")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run_engines(_scene, 1, folder, {}, [[GROUPS]], [GROUPS])[0]


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_tensor_parallel_ranks_agree_with_each_other_and_with_one_rank(
    folder: Path, alone: dict[str, Any], expert_parallel: bool
) -> None:
    layout = {"tensor_parallel": 2, "expert_parallel": expert_parallel}
    both = [GROUPS, GROUPS]
    first, second = run_engines(_scene, 2, folder, layout, [both], both)
    assert {key: first[key] for key in ("sampled", "greedy", "noise")} == {
        key: second[key] for key in ("sampled", "greedy", "noise")
    }
    assert first["named memory"] == []
    for whose in ("cpushm", "psm_"):
        assert any(whose in place for place in first["unnamed memory"]), "of the communicators, of the message queue"
    assert first["merged"] == second["merged"]
    _check_merge([first, second], alone)
    assert log_prob_gaps(first["merged"], alone["merged"]).mean() < 0.1
    # Each rank rounds its own half of o_proj's input to int8, with a scale of its own: equal up to W8A8's error, so
    # that a near-tie ends the equality of tokens now and then (measured: mean gap 0.03, 5 of 6 tokens come before it).
    gaps = log_prob_gaps(first["greedy"], alone["greedy"])
    assert gaps.mean() < 0.1
    assert len(gaps) > 0.5 * len(log_probs_of(alone["greedy"]))
    assert log_prob_gaps(first["noise"], alone["noise"]).mean() < 0.1
    merged = hf_model(folder, random_adapters(folder, seed=1))
    errors = [np.abs(hf_log_probs(merged, seen["greedy"]) - log_probs_of(seen["greedy"])) for seen in (first, alone)]
    assert errors[0].mean() < 1.5 * errors[1].mean()
    assert first["held"]["weights"] < 0.75 * alone["held"]["weights"]
    assert first["held"]["adapters"] < 0.8 * alone["held"]["adapters"]
    np.testing.assert_equal(first["routed"], second["routed"])
    assert routing_agreement(first, alone) > 0.9


def test_data_and_expert_parallel_equals_one_rank_whatever_the_load(folder: Path, alone: dict[str, Any]) -> None:
    calls = [[GROUPS[:3], GROUPS[3:]], [GROUPS, []], [[], GROUPS], [[], []], [GROUPS[:4], GROUPS[4:]]]
    layout = {"data_parallel": 2, "expert_parallel": True}
    ranks = run_engines(_scene, 2, folder, layout, calls, [GROUPS[:3], GROUPS[3:]])
    for call, shares in enumerate(calls):
        outputs = [rank["sampled"][call] for rank in ranks]
        assert [sorted(output) for output in outputs] == shares
        merged = _merged(outputs)
        if merged:
            assert tokens_of(merged) == tokens_of(alone["sampled"][0])
            # Exact but for batches of up to 4 sequences, whose unquantized layers take another kernel.
            assert np.median(log_prob_gaps(merged, alone["sampled"][0])) == 0
    _check_merge(ranks, alone)
    for kind in ("greedy", "noise", "merged"):
        merged = _merged([rank[kind] for rank in ranks])
        assert tokens_of(merged) == tokens_of(alone[kind])
    np.testing.assert_equal({**ranks[0]["routed"], **ranks[1]["routed"]}, alone["routed"])
    assert ranks[0]["held"]["weights"] < 0.75 * alone["held"]["weights"]
    assert ranks[0]["held"]["adapters"] < 0.75 * alone["held"]["adapters"]
    # Half of the experts, and all else: of other ranks' experts no byte.
    assert ranks[0]["read"] + ranks[1]["read"] == alone["read"] + _bytes_beside_experts(folder)
    assert ranks[0]["held merged"] == ranks[0]["held"] | {"adapters": 0}


def test_data_parallel_without_expert_parallel_is_two_engines(folder: Path, alone: dict[str, Any]) -> None:
    layout = {"data_parallel": 2, "expert_parallel": False}
    ranks = run_engines(_scene, 2, folder, layout, [[GROUPS[:3], GROUPS[3:]]], [GROUPS, []])
    assert tokens_of(_merged([rank["sampled"][0] for rank in ranks])) == tokens_of(alone["sampled"][0])
    assert ranks[0]["greedy"] == alone["greedy"]
    assert ranks[0]["held"] == alone["held"]


def test_key_value_heads_fewer_than_ranks_are_replicated_with_their_adapters(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("qwen3_moe", "bfloat16", kv_heads=1, layers=2)
    adapters = {name: t for name, t in random_adapters(folder, seed=1).items() if ".experts." not in name}
    outputs, peer = run_engines(_with_and_without_experts, 2, folder, {"tensor_parallel": 2, "expert_parallel": False})
    assert outputs == peer
    error = np.abs(hf_log_probs(hf_model(folder, adapters), outputs) - log_probs_of(outputs)).mean()
    effect = np.abs(hf_log_probs(hf_model(folder), outputs) - log_probs_of(outputs)).mean()
    assert error < 0.1
    assert effect > 5 * error
