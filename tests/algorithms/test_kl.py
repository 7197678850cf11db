"""KL estimators beyond k1-k3, the exact divergence, and the controller."""

import math

import pytest
import torch

from qerl_rl.algorithms.kl import ESTIMATORS, full_kl, kl_estimate, kl_penalties, next_kl_coefficient
from qerl_rl.config.checks import KL_ESTIMATORS


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_distances_of_hand_computed_tokens():
    policy, reference = doubles(0.5, 0.25).log(), doubles(0.25, 0.5).log()
    torch.testing.assert_close(kl_estimate(policy, reference, "abs"), doubles(1.0, 1.0) * math.log(2))
    torch.testing.assert_close(kl_estimate(policy, reference, "mse"), doubles(0.5, 0.5) * math.log(2) ** 2)


def test_a_launch_file_can_name_exactly_what_can_be_estimated():
    assert KL_ESTIMATORS == ESTIMATORS


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_estimates_equal_finite_differences(estimator):
    policy, reference = torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, reference, estimator).sum(), policy.requires_grad_())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_divergence_and_far_ones_a_finite_one(estimator):
    policy = doubles(-1.0, -700.0)
    assert kl_estimate(policy, policy, estimator).abs().max().item() == 0.0
    assert torch.isfinite(kl_estimate(doubles(0.0, -3000.0), doubles(-3000.0, 0.0), estimator)).all()


def test_the_full_divergence_equals_torchs_and_ignores_offsets():
    logits, reference = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    oracle = torch.nn.functional.kl_div(
        reference.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(full_kl(logits, reference), oracle)
    torch.testing.assert_close(full_kl(logits + 1e4, reference - 1e4), oracle, rtol=1e-8, atol=1e-8)
    assert torch.autograd.gradcheck(lambda x: full_kl(x, reference), logits.requires_grad_())


def test_the_full_divergence_is_the_mean_of_k1_over_the_policys_tokens():
    logits, reference = torch.randn(2, 1, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    policy, other = logits.log_softmax(-1)[0], reference.log_softmax(-1)[0]
    expectation = (policy.exp() * kl_estimate(policy, other, "k1")).sum()
    assert full_kl(logits, reference).item() == pytest.approx(expectation.item())


def test_tokens_that_neither_policy_can_say_add_nothing():
    logits = torch.tensor([[0.0, math.log(3), -math.inf]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    found = full_kl(logits, reference)
    found.sum().backward()
    assert found.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert torch.isfinite(logits.grad).all()


def test_penalties_are_costs_without_gradient():
    policy = doubles(0.5, 0.25).log().requires_grad_()
    found = kl_penalties(policy, doubles(0.25, 0.5).log(), estimator="k1", coefficient=0.5)
    torch.testing.assert_close(found, doubles(-0.5, 0.5) * math.log(2))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.1, 0.4),  # at the target
        (0.11, 0.4 * (1 + 0.1 * 0.5)),  # 10 % above it, half a horizon of samples
        (5.0, 0.4 * (1 + 0.2 * 0.5)),  # the error is limited
        (0.0, 0.4 * (1 - 0.2 * 0.5)),
        (-1.0, 0.4 * (1 - 0.2 * 0.5)),  # k1 of a few tokens can be negative
    ],
)
def test_the_controller_moves_the_coefficient_towards_the_target(kl, expected):
    found = next_kl_coefficient(0.4, kl, target=0.1, horizon=100, samples=50)
    assert found == pytest.approx(expected)


def test_the_controller_settles_where_the_divergence_meets_its_target():
    coefficient = 0.01
    for _ in range(2000):
        # A policy that goes 0.2 / coefficient nats away.
        coefficient = next_kl_coefficient(coefficient, 0.2 / coefficient, target=2.0, horizon=100, samples=10)
    assert coefficient == pytest.approx(0.1, rel=1e-6)


def test_a_fixed_coefficient_stays_and_never_turns_negative():
    assert next_kl_coefficient(0.3, math.nan, target=0.0, horizon=1, samples=1) == 0.3
    assert next_kl_coefficient(0.3, 0.0, target=1.0, horizon=1, samples=1000) == 0.0
    with pytest.raises(ValueError, match="nan"):
        next_kl_coefficient(0.3, math.nan, target=1.0, horizon=1, samples=1)
