"""Estimates of the KL divergence between the policy and its reference, one a token."""

from __future__ import annotations

from torch import Tensor

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) at each token, from tokens sampled by the policy; x = log p_reference - log p_policy.

    Schulman, "Approximating KL divergence" (2020): k1 = -x, unbiased, large variance; k2 = x^2 / 2, biased, small
    variance; k3 = e^x - 1 - x, unbiased, never negative (GRPO, arXiv 2402.03300, eq. 4). As a loss differentiated
    through `log_probs`, k2 has the gradient of the KL divergence, k3 approaches it near the reference, and that of k1
    is zero on average.

    Args: log_probs, reference_log_probs [T]; estimator k1, k2 or k3.
    Returns: [T], with the gradient of `log_probs`.
    Raises: ValueError for another estimator.
    """
    difference = (reference_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2.0
    if estimator == "k3":
        return difference.exp() - 1.0 - difference
    raise ValueError(f"KL estimator {estimator!r} is none of k1, k2, k3")
