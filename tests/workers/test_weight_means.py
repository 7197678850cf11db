"""Importance weights whose mean is 1 over the whole batch: the same update in every layout and in any micro-batches."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from qerl_rl.config.schema import AlgorithmConfig, RolloutCorrectionConfig
from tests.train.models import make_config, make_samples, start_engine
from transfer_dock import Jagged
from workers.actor_hybrid import ActorHybridWorker

MINI_BATCHES = ([0, 5, 2, 7], [4, 1, 3, 6])
REINFORCE = {"bypass_mode": True, "loss_type": "reinforce"}
CORRECTIONS = {
    "token": {"rollout_is": "token", "rollout_is_threshold": "1.3"},
    # What is rejected has a part in the mean.
    "sequence, rejecting": {
        **{"rollout_is": "sequence", "rollout_is_threshold": "1.5"},
        **{"rollout_rs": "token_k2", "rollout_rs_threshold": "0.05"},
    },
    "token, band, reinforce": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.3", **REINFORCE},
    "sequence, reinforce": {"rollout_is": "sequence", "rollout_is_threshold": "1.5", **REINFORCE},
}
LAYOUTS = {
    "one micro-batch": {},
    "data 2, micro-batches of one": {"workers": 2, "micro_batch_tokens": 1},
    "tensor 2, expert 2": {"workers": 2, "tensor_parallel": 2, "expert_parallel": 2},
    "pipeline 2, micro-batches of one": {"workers": 2, "pipeline_parallel": 2, "micro_batch_tokens": 1},
}
FACTOR = "rollout_correction/is_batch_norm_factor"


def columns_of(base):
    """What the dock holds of eight samples, by column; base: their log-probs by the model as it begins."""
    samples, random = make_samples(8), np.random.default_rng(5)
    ends = zip(samples.tokens, samples.response_lengths, strict=True)
    prompts, responses = zip(*((tokens[:-count], tokens[-count:]) for tokens, count in ends), strict=True)
    noisy = {
        name: [row + random.normal(0, width, len(row)).astype(np.float32) for row in base]
        for name, width in {"old_log_probs": 0.1, "rollout_log_probs": 0.4}.items()
    }
    own = {"prompts": prompts, "responses": responses, "advantages": samples.columns["advantages"]}
    return {**own, "reference_log_probs": base, **noisy}


def lease(columns, rows):
    chosen = {name: Jagged.from_rows([values[row] for row in rows]) for name, values in columns.items()}
    return SimpleNamespace(keys=rows, columns=chosen)


def base_scores(paths):
    return start_engine(make_config(paths)).log_probs(make_samples(8)).log_probs


def worker_of(engine, correction):
    config = dataclasses.replace(
        engine.config,
        algorithm=AlgorithmConfig(entropy_coefficient=0.01),
        rollout_correction=RolloutCorrectionConfig(rollout_is_batch_normalize=True, **correction),
    )
    worker = ActorHybridWorker(dataclasses.asdict(config), 0, 1)
    worker.train = engine
    return worker


def updates(paths, layout, columns):
    """Two updates under every correction, one after the other; and what the policy thought before each of them."""
    # With an epsilon far above the gradients Adam's updates are smooth in them, and rounding does not grow.
    engine = start_engine(make_config(paths, adam_eps=1.0, learning_rate=0.05, **layout))
    found = {}
    for name, correction in CORRECTIONS.items():
        before, results, size = [], [], engine.data_parallel_size
        batches = [lease(columns, rows[engine.data_parallel_rank :: size]) for rows in MINI_BATCHES]
        worker = worker_of(engine, correction)
        if "bypass_mode" not in correction:
            results = worker.update(batches, 1, 0.1)
        else:
            for rows, batch in zip(MINI_BATCHES, batches, strict=True):
                whole = make_samples(8).select(rows)
                scores = engine.log_probs(whole)
                before.append(scores and scores.log_probs)
                results += worker.update([batch], 1, 0.1)
        found[name] = {"updates": results, "before": before}
    return found


@pytest.fixture(scope="module")
def scene(tiny_w8a8, one_rank, two_ranks):
    model = {"w8a8": str(tiny_w8a8("qwen3_moe"))}
    columns = columns_of(one_rank(base_scores, model)[0])
    pools = {1: one_rank, 2: two_ranks}
    by_layout = {
        name: pools[layout.get("workers", 1)](updates, model, layout, columns) for name, layout in LAYOUTS.items()
    }
    return columns, by_layout


def published(learner, rollout, correction):
    """The normalizing factor by the formulas of verl's docs/algo/rollout_corr_math.md, 3.3 and 3.4, in float64."""
    log_ratios = [left.astype(float) - right.astype(float) for left, right in zip(learner, rollout, strict=True)]
    *low, high = map(float, correction["rollout_is_threshold"].split("_"))
    if correction["rollout_is"] == "token":
        ratios = np.exp(np.concatenate(log_ratios))
    else:
        ratios = np.exp([row.sum() for row in log_ratios])
    weights = np.where((ratios >= low[0]) & (ratios <= high), ratios, 0.0) if low else np.minimum(ratios, high)
    assert ((weights != ratios).any(), (weights == ratios).any()) == (True, True)
    return weights.sum() / len(weights)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_factor_is_that_of_the_published_formulas_over_the_whole_batch(scene, correction):
    columns, by_layout = scene
    found = by_layout["one micro-batch"][0][correction]
    if "reinforce" in correction:
        # The policy that is updated, against the engine: mini-batch by mini-batch.
        sampled = [[columns["rollout_log_probs"][row] for row in rows] for rows in MINI_BATCHES]
        expected = [published(*pair, CORRECTIONS[correction]) for pair in zip(found["before"], sampled, strict=True)]
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    else:
        expected = [published(columns["old_log_probs"], columns["rollout_log_probs"], CORRECTIONS[correction])] * 2
    assert [update[FACTOR] for update in found["updates"]] == pytest.approx(expected, rel=1e-5)
    assert all(abs(factor - 1.0) > 0.01 for factor in expected)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one micro-batch"])
def test_layouts_and_micro_batches_change_nothing(scene, layout, correction):
    _, by_layout = scene
    expected = by_layout["one micro-batch"][0][correction]["updates"]
    assert all(update["grad_norm"] > 1e-3 for update in expected)
    for rank in by_layout[layout]:
        for found, wanted in zip(rank[correction]["updates"], expected, strict=True):
            # Every update adds rounding of its own to the weights that the next ones see; the losses are means of
            # numbers of size 1 with both signs.
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
