"""Rejection by verl's criteria: numbers by hand, sequences as a whole, and updates that survive losing everything."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.choices import LOSSES
from qerl_rl.algorithms.correction import importance_ratios, limited, weight_metrics
from qerl_rl.algorithms.grpo import grpo_loss
from qerl_rl.algorithms.mismatch import finish_mismatch
from qerl_rl.algorithms.rejection import divergences, kept_by, kept_tokens
from qerl_rl.config.correction_schema import CRITERIA
from qerl_rl.config.schema import AlgorithmConfig, RolloutCorrectionConfig
from tests.algorithms.test_correction import doubles, problem
from workers.comparison import comparison

# p_learner / p_rollout of two sequences of two tokens: geometric means 1 and sqrt(2 / 10), products 1 and 1 / 5.
LEARNER, ROLLOUT = doubles(0.4, 0.2, 0.8, 0.05).log(), doubles(0.2, 0.4, 0.4, 0.5).log()
IDS = torch.tensor([0, 0, 1, 1])


def k3(ratio):
    return ratio - 1 - math.log(ratio)


def kept(criterion, low, high):
    return kept_by(LEARNER, ROLLOUT, IDS, criterion=criterion, low=low, high=high).tolist()


def test_divergences_of_hand_computed_tokens():
    ratios = doubles(2.0, 0.5, 2.0, 0.1)
    torch.testing.assert_close(divergences(LEARNER, ROLLOUT, "k1"), -ratios.log())
    torch.testing.assert_close(divergences(LEARNER, ROLLOUT, "k2"), ratios.log().square() / 2)
    torch.testing.assert_close(divergences(LEARNER, ROLLOUT, "k3"), ratios - 1 - ratios.log())
    # Coins of 0.4 and 0.2: KL(0.2 || 0.4) = 0.2 log 0.5 + 0.8 log(4 / 3), and the larger one the other way round.
    expected = 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert expected > 0.2 * math.log(0.5) + 0.8 * math.log(4 / 3)
    assert divergences(LEARNER, ROLLOUT, "binary_kl")[0].item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="none of k1, k2, k3"):
        divergences(LEARNER, ROLLOUT, "k4")


@pytest.mark.parametrize(
    ("criterion", "low", "high", "expected"),
    [
        # e^k1 is p_rollout / p_learner: 1/2, 2, 1/2, 10.
        ("token_k1", 0.6, 12.0, [False, True, False, True]),
        ("token_k1", 0.4, 2.5, [True, True, True, False]),
        ("token_k3", 0.0, k3(2.0) + 1e-9, [True, True, True, False]),
        ("token_k3", 0.0, k3(0.5) + 1e-9, [False, True, False, False]),
        ("token_k2", 0.0, math.log(2) ** 2 / 2 + 1e-9, [True, True, True, False]),
        ("seq_mean_k1", 0.5, 2.0, [True, True, False, False]),
        ("seq_mean_k1", 0.5, math.sqrt(5) + 1e-9, [True] * 4),
        ("seq_sum_k1", 0.5, 4.9, [True, True, False, False]),
        ("seq_sum_k1", 0.5, 5.1, [True] * 4),
        ("seq_mean_k3", 0.0, (k3(2.0) + k3(0.5)) / 2 + 1e-9, [True, True, False, False]),
        ("seq_mean_k3", 0.0, (k3(2.0) + k3(0.5)) / 2 - 1e-9, [False] * 4),
        ("seq_sum_k3", 0.0, k3(2.0) + k3(0.5) + 1e-9, [True, True, False, False]),
        ("seq_max_k3", 0.0, k3(2.0) + 1e-9, [True, True, False, False]),
        ("seq_max_k2", 0.0, math.log(10) ** 2 / 2 + 1e-9, [True] * 4),
        ("seq_sum_k2", 0.0, math.log(2) ** 2 + 1e-9, [True, True, False, False]),
        ("seq_mean_k2", 0.0, math.log(2) ** 2 / 2 + 1e-9, [True, True, False, False]),
        ("binary_kl", 0.0, 0.2, [True, True, False, False]),
    ],
)
def test_each_criterion_on_hand_computed_ratios(criterion, low, high, expected):
    assert kept(criterion, low, high) == expected


def test_other_criteria_are_refused():
    for criterion in ("group_mean_k1", "seq_median_k1", "token_k9"):
        with pytest.raises(ValueError, match=r"none of|judges neither"):
            kept(criterion, 0.5, 2.0)


def test_several_criteria_and_the_veto_must_all_pass():
    def all_kept(**keys):
        return kept_tokens(LEARNER, ROLLOUT, IDS, RolloutCorrectionConfig(**keys)).tolist()

    assert all_kept() == [True] * 4
    assert all_kept(rollout_rs="token_k1", rollout_rs_threshold="0.6_3") == [False, True, False, False]
    both = {"rollout_rs": "seq_mean_k1, token_k3", "rollout_rs_threshold": f"2, {k3(0.5) + 1e-9}"}
    assert all_kept(**both) == [False, True, False, False]
    # The fourth token's ratio is 0.1: its whole sequence goes.
    assert all_kept(rollout_token_veto_threshold=0.11) == [True, True, False, False]
    assert all_kept(rollout_token_veto_threshold=0.09) == [True] * 4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(CRITERIA), st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_sequences_are_kept_whole_and_judged_by_themselves_and_equal_engines_lose_nothing(criterion, seed, lengths):
    _, _, columns = problem(seed, lengths)
    ids, rollout, old = columns["sequence_ids"], columns["rollout_log_probs"], columns["old_log_probs"]
    low, high = (0.7, 1.4) if criterion.endswith("k1") else (0.0, 0.08)

    def judged(part):
        own = part.cumsum(0) - 1
        chosen = part[ids]
        return kept_by(old[chosen], rollout[chosen], own[ids[chosen]], criterion=criterion, low=low, high=high)

    everything = judged(torch.ones(len(lengths), dtype=torch.bool))
    for index in range(len(lengths)):
        alone = torch.zeros(len(lengths), dtype=torch.bool)
        alone[index] = True
        assert judged(alone).equal(everything[ids == index])
        if criterion.startswith("seq_"):
            assert len(set(everything[ids == index].tolist())) == 1
    assert kept_by(old, old, ids, criterion=criterion, low=low, high=high).all()


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_rejected_tokens_have_no_gradient_and_a_step_that_loses_all_has_the_loss_zero(loss):
    log_probs, entropy, columns = problem(3, [3, 4])
    # The second sequence is far from what sampled it, the first one exactly that.
    columns["rollout_log_probs"] = columns["old_log_probs"] + doubles(0, 0, 0, 1, 1, 1, 1)
    config = AlgorithmConfig(loss=loss, kl_coefficient=0.2, entropy_coefficient=0.01)
    weights = torch.full((7,), 1 / 7).double()

    def update(correction, columns=columns):
        leaf = log_probs.clone().requires_grad_()
        value, metrics = grpo_loss(config, correction)(leaf, entropy, columns, weights)
        return value.item(), torch.autograd.grad(value, leaf)[0], metrics

    geometric = RolloutCorrectionConfig(rollout_rs="seq_mean_k1", rollout_rs_threshold="0.5_2.0")
    _, gradient, metrics = update(geometric)
    assert gradient[3:].eq(0).all()
    assert gradient[:3].ne(0).any()
    assert metrics["rollout_correction/rs_masked"].item() == 4
    _, plain, without = update(RolloutCorrectionConfig())
    assert gradient[:3].equal(plain[:3])
    assert "rollout_correction/rs_masked" not in without
    away = columns | {"rollout_log_probs": columns["old_log_probs"] + 1}
    value, gradient, metrics = update(geometric, away)
    assert value == 0.0
    assert gradient.eq(0).all()
    assert metrics["rollout_correction/rs_masked"].item() == 7
    # In bypass mode the old log-probs are the engine's, and the updated policy is what is judged.
    bypass = RolloutCorrectionConfig(rollout_rs="token_k3", rollout_rs_threshold="0.05", bypass_mode=True)
    judged = {"old_log_probs": log_probs.clone(), "rollout_log_probs": log_probs + doubles(0, 0, 0, 0, 0, 0, 1)}
    assert update(bypass, columns | judged)[2]["rollout_correction/rs_masked"].item() == 1


def test_icepop_counts_weights_inside_its_band_and_nothing_outside():
    ratios = importance_ratios(LEARNER, ROLLOUT, IDS, level="token")
    torch.testing.assert_close(limited(ratios, 0.4, 3.0), doubles(2.0, 0.5, 2.0, 0.0))
    torch.testing.assert_close(limited(ratios, 0.05, 1.5), doubles(0.0, 0.5, 0.0, 0.1))
    torch.testing.assert_close(limited(ratios, 0.0, 1.5), doubles(1.5, 0.5, 1.5, 0.1))
    metrics = weight_metrics(ratios, 0.4, 3.0)
    assert metrics["rollout_correction/is_clipped"] == 0.25
    assert metrics["rollout_correction/is_mean"] == pytest.approx(4.5 / 4)
    log_probs, entropy = LEARNER.clone().requires_grad_(), torch.zeros(4).double()
    columns = {
        "old_log_probs": LEARNER,
        "rollout_log_probs": ROLLOUT,
        "advantages": doubles(1.0, 1.0, -1.0, 3.0),
        "sequence_ids": IDS,
    }
    correction = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold="0.4_3.0")
    loss, _ = grpo_loss(AlgorithmConfig(), correction)(log_probs, entropy, columns, torch.ones(4).double())
    assert loss.item() == pytest.approx(-2.0 - 0.5 + 2.0)
    assert torch.autograd.grad(loss, log_probs)[0].tolist() == pytest.approx([-2.0, -0.5, 2.0, 0.0])


def test_a_rank_counts_the_samples_that_lost_a_token():
    rows = [[part.float().numpy() for part in column.split(2)] for column in (ROLLOUT, LEARNER)]
    correction = RolloutCorrectionConfig(rollout_rs="token_k1", rollout_rs_threshold="0.4_2.5")
    found = finish_mismatch(comparison(*rows, correction))
    assert found["rollout_correction/rs_sequences_masked"] == 0.5
    assert not any("sum_of" in name for name in found)
    assert np.isfinite(list(found.values())).all()
