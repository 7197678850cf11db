"""Rollout correction: numbers by hand, no change where both engines agree, and exactness in expectation."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.choices import LOSSES
from qerl_rl.algorithms.correction import (
    corrected_weights,
    importance_ratios,
    mean_weight,
    weight_metrics,
    weight_sums,
    with_effective_share,
)
from qerl_rl.algorithms.grpo import grpo_loss
from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT
from qerl_rl.algorithms.sequences import sequence_ids, token_weights
from qerl_rl.config.schema import AlgorithmConfig, RolloutCorrectionConfig

UNBOUNDED = 1e9
LEVELS = ["token", "sequence"]


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def problem(seed, lengths, spread=0.5):
    """log_probs, entropy and columns of sequences with one advantage each."""
    generator, sizes = torch.Generator().manual_seed(seed), torch.tensor(lengths)

    def normal(count, scale):
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    tokens = int(sizes.sum())
    log_probs = -1.5 + normal(tokens, 0.3)
    columns = {
        "old_log_probs": log_probs + normal(tokens, 0.1),
        "advantages": normal(len(lengths), 1.0).repeat_interleave(sizes),
        "reference_log_probs": log_probs + normal(tokens, 0.5),
        "sequence_ids": sequence_ids(sizes),
    }
    return (
        log_probs,
        1.0 + normal(tokens, 0.2),
        columns | {"rollout_log_probs": columns["old_log_probs"] + normal(tokens, spread)},
    )


def test_ratios_and_their_metrics_of_hand_computed_tokens():
    old, rollout = doubles(0.5, 0.4, 0.3, 0.9).log(), doubles(0.25, 0.8, 0.1, 0.9).log()
    ids = torch.tensor([0, 0, 1, 1])
    by_token = importance_ratios(old, rollout, ids, level="token")
    torch.testing.assert_close(by_token, doubles(2.0, 0.5, 3.0, 1.0))
    torch.testing.assert_close(importance_ratios(old, rollout, ids, level="sequence"), doubles(1.0, 1.0, 3.0, 3.0))
    # Truncated at 2: 2, 0.5, 2, 1.
    metrics = with_effective_share(weight_metrics(by_token, 0.0, 2.0) | {"other": 1.0})
    assert metrics == pytest.approx(
        {
            "rollout_correction/is_mean": 5.5 / 4,
            "rollout_correction/is_max": 2.0,
            "rollout_correction/is_clipped": 0.25,
            "rollout_correction/ess": 5.5**2 / (4 * (4 + 0.25 + 4 + 1)),
            "other": 1.0,
        }
    )
    assert with_effective_share({"other": 1.0}) == {"other": 1.0}


def test_an_absurd_token_stays_finite_and_another_level_is_refused():
    far, ids = doubles(-1000.0, -1000.0), torch.tensor([0, 0])
    for level in LEVELS:
        up = importance_ratios(torch.zeros(2).double(), far, ids, level=level)
        torch.testing.assert_close(up, doubles(LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp())
        assert (importance_ratios(far, torch.zeros(2).double(), ids, level=level) > 0).all()
    with pytest.raises(ValueError, match="neither token nor sequence"):
        importance_ratios(far, far, ids, level="group")


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("level", LEVELS)
def test_equal_log_probs_leave_loss_and_gradient_as_they_are_bit_for_bit(loss, level):
    log_probs, entropy, columns = problem(3, [4, 1, 6])
    columns["rollout_log_probs"] = columns["old_log_probs"].clone()
    config = AlgorithmConfig(loss=loss, kl_coefficient=0.2, entropy_coefficient=0.01)
    found = []
    for correction in (RolloutCorrectionConfig(), RolloutCorrectionConfig(rollout_is=level)):
        leaf = log_probs.clone().requires_grad_()
        value, metrics = grpo_loss(config, correction)(leaf, entropy, columns, torch.full((11,), 0.7).double())
        value.backward()
        found.append((value.item(), leaf.grad, {name: number.item() for name, number in metrics.items()}))
    assert found[0][0] == found[1][0]
    assert found[0][1].equal(found[1][1])
    assert found[0][2] == found[1][2]


def test_weights_scale_the_policy_loss_only_and_up_to_the_threshold():
    log_probs, entropy, columns = problem(5, [2, 1])
    columns["old_log_probs"] = log_probs
    columns["rollout_log_probs"] = log_probs - doubles(4.0, 0.5, 1.5).log()
    columns["advantages"] = doubles(1.0, 1.0, -2.0)
    weights = torch.ones(3).double()
    correction = RolloutCorrectionConfig(rollout_is="token", rollout_is_threshold="2.0")
    corrected, _ = grpo_loss(AlgorithmConfig(), correction)(log_probs, entropy, columns, weights)
    # At ratio 1 a token's loss is -A.
    assert corrected.item() == pytest.approx(-2.0 * 1.0 - 0.5 * 1.0 + 1.5 * 2.0)
    others = AlgorithmConfig(kl_coefficient=0.3, entropy_coefficient=0.1)
    plain, _ = grpo_loss(others)(log_probs, entropy, columns, weights)
    bare, _ = grpo_loss(AlgorithmConfig())(log_probs, entropy, columns, weights)
    full, _ = grpo_loss(others, correction)(log_probs, entropy, columns, weights)
    assert full.item() - corrected.item() == pytest.approx(plain.item() - bare.item())
    del columns["rollout_log_probs"]
    with pytest.raises(ValueError, match="rollout_log_probs"):
        grpo_loss(AlgorithmConfig(), correction)(log_probs, entropy, columns, weights)


def published_weights(old, rollout, mask, correction):
    """Normalized weights by verl's docs/algo/rollout_corr_math.md, 3.3 and 3.4: float64 [S, longest], padding is 0."""
    log_ratios = (old - rollout) * mask
    low, high = correction.is_band
    if correction.rollout_is == "token":
        ratios = np.exp(log_ratios)
    else:
        ratios = np.exp(log_ratios.sum(axis=1, keepdims=True)) * np.ones_like(mask)
    weights = np.where((ratios >= low) & (ratios <= high), ratios, 0.0) if low else np.minimum(ratios, high)
    weights = weights * mask
    by_sequence = weights.sum(axis=1) / mask.sum(axis=1)
    mean = weights.sum() / mask.sum() if correction.rollout_is == "token" else by_sequence.mean()
    return weights / (mean if mean > 1e-8 else 1.0), mean


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(LEVELS),
    st.sampled_from(["1.1", "2.0", "0.8_1.6", "1.6_1.7"]),
    st.integers(0, 10_000),
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
)
def test_normalized_weights_are_those_of_the_published_formulas_however_the_batch_is_split(
    level, threshold, seed, lengths
):
    log_probs, _, columns = problem(seed, lengths)
    correction = RolloutCorrectionConfig(
        rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=True
    )
    mask = (np.arange(max(lengths))[None] < np.array(lengths)[:, None]).astype(float)
    padded = {name: np.full(mask.shape, np.pi) for name in ("old_log_probs", "rollout_log_probs")}
    for name, values in padded.items():
        values[mask > 0] = columns[name].numpy()
    expected, mean = published_weights(*padded.values(), mask, correction)
    # Each sequence is a part of its own, as if on a rank of its own.
    ends = torch.tensor(lengths).cumsum(0).tolist()
    sums = []
    for first, last in zip([0, *ends], ends, strict=False):
        one, ids = slice(first, last), torch.zeros(last - first, dtype=torch.int64)
        ratios = importance_ratios(columns["old_log_probs"][one], columns["rollout_log_probs"][one], ids, level=level)
        sums.append(weight_sums(ratios, ids, correction))
    factor = mean_weight(*map(sum, zip(*sums, strict=True)))
    ones = torch.ones(ends[-1]).double()
    weights, others, metrics = corrected_weights(log_probs, columns, ones, correction, weight_mean=factor)
    np.testing.assert_allclose(weights.numpy(), expected[mask > 0], rtol=1e-12)
    assert others.equal(ones)
    assert metrics["rollout_correction/is_batch_norm_factor"].item() == pytest.approx(factor * ends[-1])
    # A batch whose weights are all 0 stays as it is.
    assert factor == pytest.approx(mean if mean else 1.0)


def test_weights_are_not_normalized_without_the_mean_of_the_whole_batch():
    log_probs, entropy, columns = problem(5, [2, 1])
    loss = grpo_loss(AlgorithmConfig(), RolloutCorrectionConfig(rollout_is="token", rollout_is_batch_normalize=True))
    with pytest.raises(ValueError, match="needs weight_mean"):
        loss(log_probs, entropy, columns, torch.ones(3).double())


def test_reinforce_weighs_unclipped_log_probs_by_the_policy_that_is_updated():
    log_probs, entropy, columns = problem(5, [2, 1])
    columns["old_log_probs"] = columns["rollout_log_probs"] = log_probs - doubles(4.0, 0.5, 1.5).log()
    columns["advantages"] = doubles(1.0, 1.0, -2.0)
    bypass = {"bypass_mode": True, "loss_type": "reinforce"}

    def gradient(**keys):
        leaf, correction = log_probs.clone().requires_grad_(), RolloutCorrectionConfig(**bypass, **keys)
        loss, metrics = grpo_loss(AlgorithmConfig(), correction)(leaf, entropy, columns, torch.ones(3).double())
        assert metrics["clip_fraction"].item() == 0
        assert metrics["ratio"].item() == pytest.approx(4.0 + 0.5 + 1.5)
        return torch.autograd.grad(loss, leaf)[0].tolist()

    assert gradient() == pytest.approx([-1.0, -1.0, 2.0])
    assert gradient(rollout_is="token") == pytest.approx([-2.0, -0.5, 2 * 1.5])
    assert gradient(rollout_is="sequence", rollout_is_threshold="9") == pytest.approx([-2.0, -2.0, 2 * 1.5])


VOCABULARY = 3


def expected_gradient(logits, sampler, rewards, correction):
    """The mean gradient of the loss over all two-token responses, each as likely as `sampler` draws it, exactly.

    Both policies are tables: logits [1 + V, V], the first row for token 1, the others for what follows each token 1.
    """
    total = torch.zeros_like(logits)
    for first, second in product(range(VOCABULARY), repeat=2):
        places = torch.tensor([0, 1 + first]), torch.tensor([first, second])
        leaf = logits.clone().requires_grad_()
        log_probs, sampled = leaf.log_softmax(-1)[places], sampler.log_softmax(-1)[places]
        columns = {
            "old_log_probs": log_probs.detach(),
            "rollout_log_probs": sampled,
            "advantages": rewards[first, second].repeat(2),
            "sequence_ids": torch.tensor([0, 0]),
        }
        loss, _ = grpo_loss(AlgorithmConfig(), correction)(
            log_probs, torch.zeros(2).double(), columns, torch.ones(2).double()
        )
        total += sampled.sum().exp() * torch.autograd.grad(loss, leaf)[0]
    return total


def test_untruncated_sequence_weights_make_the_off_policy_gradient_exact_in_expectation():
    generator = torch.Generator().manual_seed(7)
    shape = (1 + VOCABULARY, VOCABULARY)
    policy, sampler = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)

    def correction(level, threshold=UNBOUNDED):
        return RolloutCorrectionConfig(rollout_is=level, rollout_is_threshold=str(threshold))

    exact = expected_gradient(policy, policy, rewards, RolloutCorrectionConfig())
    torch.testing.assert_close(expected_gradient(policy, sampler, rewards, correction("sequence")), exact)
    reinforce = RolloutCorrectionConfig(
        rollout_is="sequence", rollout_is_threshold=str(UNBOUNDED), bypass_mode=True, loss_type="reinforce"
    )
    torch.testing.assert_close(expected_gradient(policy, sampler, rewards, reinforce), exact)
    errors = {
        name: float((expected_gradient(policy, sampler, rewards, how) - exact).norm())
        for name, how in {
            "none": RolloutCorrectionConfig(),
            "token": correction("token"),
            "truncated": correction("sequence", 1.0),
        }.items()
    }
    # What is left out shows: the whole weight, the prefix's, what lies above the threshold.
    assert min(errors.values()) > 0.01
    assert errors["token"] < errors["none"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LEVELS),
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=2, max_size=6),
)
def test_any_split_into_micro_batches_gives_the_same_gradient(level, seed, lengths):
    log_probs, entropy, columns = problem(seed, lengths)
    function = grpo_loss(AlgorithmConfig(), RolloutCorrectionConfig(rollout_is=level))
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def gradient(parts):
        leaf = log_probs.clone().requires_grad_()
        total = torch.zeros(()).double()
        for part in parts:
            tokens = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in part])
            sizes = torch.tensor([lengths[s] for s in part])
            own = {name: column[tokens] for name, column in columns.items()} | {"sequence_ids": sequence_ids(sizes)}
            weights, _ = token_weights(sizes, "sequence_mean", 1)
            total = total + function(leaf[tokens], entropy[tokens], own, weights.double())[0]
        return torch.autograd.grad(total, leaf)[0]

    whole = gradient([list(range(len(lengths)))])
    torch.testing.assert_close(gradient([[s] for s in reversed(range(len(lengths)))]), whole)
