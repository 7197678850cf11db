"""What the driver adds to the reward function: length and KL."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qerl_rl.config.schema import AlgorithmConfig, Config, RewardModelConfig, RolloutConfig
from trainer.outcome import step_outcome
from transfer_dock import Jagged, SampleKey

CONFIG = Config(rollout=RolloutConfig(max_response_tokens=4))


def batch():
    """Two groups of two samples, of 1, 3, 4 and 2 tokens."""
    rows = {
        "responses": [np.arange(length, dtype=np.int32) for length in (1, 3, 4, 2)],
        "old_log_probs": [np.float32(row) for row in ([-1.0], [-1.0, -2.0, -3.0], [-1.0] * 4, [-2.0, -2.0])],
        "reference_log_probs": [np.float32(row) for row in ([-1.5], [-1.0, -2.0, -2.0], [-1.0] * 4, [-2.0, -4.0])],
    }
    columns = {name: Jagged.from_rows(values) for name, values in rows.items()}
    columns["rewards"] = np.array([1.0, 0.0, 0.5, 0.5], dtype=np.float32)
    columns["truncated"] = np.array([0.0, 0.0, 1.0, 0.0], dtype=np.float32)
    return SimpleNamespace(keys=[SampleKey(1, row // 2, row % 2) for row in range(4)], columns=columns)


def test_a_reward_model_on_the_cards_adds_its_weighted_score():
    judge = RewardModelConfig(path="judge", backend="megatron", weight=0.5)
    rows = batch()
    rows.columns["model_scores"] = np.array([2.0, -2.0, 0.0, 1.0], dtype=np.float32)
    found, metrics = step_outcome(replace(CONFIG, reward_model=judge), rows, 0.0)
    assert found.rewards.tolist() == [2.0, -1.0, 0.5, 1.0]
    assert metrics["reward/model_mean"] == 0.25
    assert metrics["reward/mean"] == 0.5


def outcome(kl_coefficient=0.0, **algorithm):
    return step_outcome(replace(CONFIG, algorithm=AlgorithmConfig(**algorithm)), batch(), kl_coefficient)


def test_without_more_keys_samples_earn_their_reward():
    found, metrics = outcome(kl_coefficient=0.5)
    assert found.rewards.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert found.group_ids.tolist() == [0, 0, 1, 1]
    assert found.lengths.tolist() == [1, 3, 4, 2]
    assert found.token_rewards.tolist() == [0.0] * 10
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/groups_without_signal"] == 0.5
    assert metrics["response/length_mean"] == 2.5
    assert metrics["response/truncated"] == 0.25
    assert not {"reward/overlong_mean", "reward/kl_mean"} & set(metrics)


def test_long_responses_lose_reward_but_not_in_the_functions_metrics():
    found, metrics = outcome(overlong_buffer_tokens=2, overlong_penalty=0.5)
    # Two tokens are free, three cost half of it, four all of it.
    assert found.rewards.tolist() == [1.0, -0.25, 0.0, 0.5]
    assert metrics["reward/overlong_mean"] == pytest.approx(-0.75 / 4)
    assert metrics["reward/mean"] == 0.5


def test_tokens_pay_for_leaving_the_reference_at_the_steered_coefficient():
    found, metrics = outcome(kl_coefficient=0.5, kl_in="reward", kl_estimator="k1")
    # k1 is log p - log p_ref: 0.5 in sample 0, -1 at the end of sample 1, 2 at the end of sample 3.
    assert found.token_rewards.tolist() == [-0.25, 0, 0, 0.5, 0, 0, 0, 0, 0, -1.0]
    assert found.totals().tolist() == [0.75, 0.5, 0.5, -0.5]
    assert metrics["reward/kl_mean"] == pytest.approx(-0.75 / 4)
