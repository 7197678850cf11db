import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.grpo import grpo_loss
from qerl_rl.algorithms.kl import kl_estimate
from qerl_rl.algorithms.losses import clipped_policy_loss
from qerl_rl.config.schema import AlgorithmConfig


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ratios_as_log_probs(*ratios: float) -> torch.Tensor:
    """Log-probs that have these ratios to old log-probs of 0."""
    return doubles(*ratios).log().requires_grad_()


def policy_loss(log_probs, advantages, weights=None, low=0.2, high=0.3):
    zeros = torch.zeros_like(log_probs)
    weights = torch.ones_like(log_probs) if weights is None else weights
    return clipped_policy_loss(log_probs, zeros, advantages, weights, clip_low=low, clip_high=high)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # d loss / d log_prob = -advantage * ratio where not clipped, else 0.
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (1.25, 2.0, -2.5, -2.5, 0.0),
        (1.5, 2.0, -2.6, 0.0, 1.0),  # too likely already: cut off at 1 + clip_high
        (0.5, 2.0, -1.0, -1.0, 0.0),  # a positive advantage has no lower clip
        (1.5, -2.0, 3.0, 3.0, 0.0),  # nor a negative one an upper clip
        (0.5, -2.0, 1.6, 0.0, 1.0),  # unlikely enough: cut off at 1 - clip_low
        (0.5, 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_regions(ratio, advantage, loss, gradient, clipped):
    log_probs = ratios_as_log_probs(ratio)
    found, metrics = policy_loss(log_probs, doubles(advantage))
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"].item() == clipped
    assert metrics["ratio"].item() == pytest.approx(ratio)
    assert metrics["approx_kl"].item() == pytest.approx(ratio - 1 - math.log(ratio))


def test_loss_is_weighted_and_metrics_are_plain_sums():
    log_probs = ratios_as_log_probs(1.0, 1.1)
    loss, metrics = policy_loss(log_probs, doubles(1.0, -1.0), weights=doubles(0.25, 2.0))
    assert loss.item() == pytest.approx(-0.25 + 2.2)
    assert metrics["policy_loss"].item() == pytest.approx(-1.0 + 1.1)
    assert not any(value.requires_grad for value in metrics.values())


def test_an_absurd_token_gives_a_finite_loss_and_gradient():
    log_probs = torch.tensor([0.0, -3000.0], requires_grad=True)
    loss, metrics = clipped_policy_loss(
        log_probs, torch.tensor([-3000.0, 0.0]), -torch.ones(2), torch.ones(2), clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(value) for value in metrics.values())


def test_kl_estimators_of_hand_computed_tokens():
    policy, reference = doubles(0.5, 0.25).log(), doubles(0.25, 0.5).log()
    assert torch.allclose(kl_estimate(policy, reference, "k1"), doubles(math.log(2), -math.log(2)))
    assert torch.allclose(kl_estimate(policy, reference, "k2"), doubles(1.0, 1.0) * math.log(2) ** 2 / 2)
    # Ratios reference / policy are 1/2 and 2.
    assert torch.allclose(kl_estimate(policy, reference, "k3"), doubles(-0.5 + math.log(2), 1.0 - math.log(2)))
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(policy, reference, "k4")


def categorical(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1)


def test_k1_and_k3_average_to_the_true_kl_divergence():
    generator = torch.Generator().manual_seed(3)
    policy = categorical(torch.randn(11, generator=generator, dtype=torch.float64))
    reference = categorical(torch.randn(11, generator=generator, dtype=torch.float64))
    oracle = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    for estimator in ("k1", "k3"):
        expectation = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
        assert expectation.item() == pytest.approx(oracle.item(), rel=1e-12)


def test_gradient_of_k2_averages_to_that_of_the_kl_divergence_and_of_k1_to_zero():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(11, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = categorical(torch.randn(11, generator=generator, dtype=torch.float64))
    policy = categorical(logits)
    divergence = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    (oracle,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    averages = {}
    for estimator in ("k1", "k2"):
        tokens = kl_estimate(policy, reference, estimator)
        (averages[estimator],) = torch.autograd.grad((policy.detach().exp() * tokens).sum(), logits, retain_graph=True)
    torch.testing.assert_close(averages["k2"], oracle, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(averages["k1"], torch.zeros_like(oracle), rtol=0, atol=1e-12)


def token_problem(seed: int, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor, dict, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(tokens, generator=generator, dtype=torch.float64)

    log_probs = -1.5 + normal(0.3)
    columns = {
        "old_log_probs": log_probs + normal(0.3),
        "advantages": normal(1.0),
        "reference_log_probs": log_probs + normal(0.5),
    }
    return log_probs, 1.0 + normal(0.2), columns, torch.rand(tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_equal_finite_differences(estimator):
    log_probs, entropy, columns, weights = token_problem(seed=5)
    config = AlgorithmConfig(kl_coefficient=0.3, kl_estimator=estimator, entropy_coefficient=0.05, clip_high=0.28)
    loss_function = grpo_loss(config)
    assert torch.autograd.gradcheck(
        lambda p, h: loss_function(p, h, columns, weights)[0], (log_probs.requires_grad_(), entropy.requires_grad_())
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 11))
def test_loss_and_metrics_do_not_depend_on_micro_batches_or_order(seed, cut):
    log_probs, entropy, columns, weights = token_problem(seed)
    loss_function = grpo_loss(AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.01))
    whole, whole_metrics = loss_function(log_probs, entropy, columns, weights)
    order = torch.randperm(len(log_probs), generator=torch.Generator().manual_seed(seed))
    loss, metrics = torch.zeros(()), dict.fromkeys(whole_metrics, 0.0)
    for part in (order[:cut], order[cut:]):
        own = {name: column[part] for name, column in columns.items()}
        part_loss, part_metrics = loss_function(log_probs[part], entropy[part], own, weights[part])
        loss = loss + part_loss
        metrics = {name: metrics[name] + part_metrics[name] for name in metrics}
    assert loss.item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)
    for name, value in whole_metrics.items():
        assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-9, abs=1e-9)


def test_grpo_combines_policy_kl_and_entropy():
    log_probs, entropy, columns, weights = token_problem(seed=6)
    plain, metrics = grpo_loss(AlgorithmConfig())(log_probs, entropy, columns, weights)
    full, _ = grpo_loss(AlgorithmConfig(kl_coefficient=0.5, entropy_coefficient=0.25))(
        log_probs, entropy, columns, weights
    )
    divergence = kl_estimate(log_probs, columns["reference_log_probs"], "k3")
    expected = plain + 0.5 * (weights * divergence).sum() - 0.25 * (weights * entropy).sum()
    assert full.item() == pytest.approx(expected.item())
    assert metrics["kl/reference"].item() == pytest.approx(divergence.sum().item())
    assert metrics["entropy"].item() == pytest.approx(entropy.sum().item())
    assert set(metrics) == {"policy_loss", "entropy", "kl/reference", "clip_fraction", "ratio", "approx_kl"}


def test_reference_is_needed_only_with_a_kl_coefficient():
    log_probs, entropy, columns, weights = token_problem(seed=7)
    del columns["reference_log_probs"]
    _, metrics = grpo_loss(AlgorithmConfig())(log_probs, entropy, columns, weights)
    assert "kl/reference" not in metrics
    with pytest.raises(ValueError, match="reference_log_probs"):
        grpo_loss(AlgorithmConfig(kl_coefficient=0.1))(log_probs, entropy, columns, weights)


def test_on_policy_gradient_is_that_of_reinforce():
    log_probs, entropy, columns, weights = token_problem(seed=8)
    columns["old_log_probs"] = log_probs.clone()
    log_probs.requires_grad_()
    grpo_loss(AlgorithmConfig())(log_probs, entropy, columns, weights)[0].backward()
    torch.testing.assert_close(log_probs.grad, -weights * columns["advantages"])
