"""The KL divergence between the policy and its reference by token, and how strongly it is to count."""

from __future__ import annotations

import torch
from torch import Tensor

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT

ESTIMATORS = ("k1", "k2", "k3", "abs", "mse")
"""What can be estimated from the log-probs of the sampled tokens alone."""
LARGEST_ERROR = 0.2
"""Relative error to which Ziegler et al. limit one step of the controller."""


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) at each token, from tokens sampled by the policy; x = log p_reference - log p_policy.

    Schulman, "Approximating KL divergence" (2020): k1 = -x, unbiased, large variance; k2 = x^2 / 2, biased, small
    variance; k3 = e^x - 1 - x, unbiased, low variance, never negative (GRPO, arXiv 2402.03300, eq. 4). As a loss
    differentiated through `log_probs`, k2 has the gradient of the KL divergence, k3 approaches it near the reference,
    and that of k1 is zero on average. abs = |x| and mse = x^2 / 2 (k2 by the name that PPO codes give it) measure a
    distance, no divergence.

    Args: log_probs, reference_log_probs [T]; estimator one of ESTIMATORS.
    Returns: [T], with the gradient of `log_probs`.
    Raises: ValueError for another estimator.
    """
    difference = (reference_log_probs - log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return -difference
    if estimator in ("k2", "mse"):
        return difference.square() / 2.0
    if estimator == "k3":
        return difference.exp() - 1.0 - difference
    if estimator == "abs":
        return difference.abs()
    raise ValueError(f"KL estimator {estimator!r} is none of {', '.join(ESTIMATORS)}")


def full_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(policy || reference) at each token, exactly: sum over the vocabulary of p * (log p - log q).

    It needs the whole distributions of both policies, which no column of the dock carries: V numbers a token.

    Args: logits, reference_logits [T, V], of any offset; -inf gives a token no probability, in both alike.
    Returns: [T] nats, never negative beyond rounding, with the gradient of `logits`.
    """
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(reference_logits, dim=-1)
    # -inf - -inf is nan, and a nan in the branch that `where` drops would still poison the gradient.
    possible = torch.isfinite(log_p)
    difference = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


def kl_penalties(log_probs: Tensor, reference_log_probs: Tensor, *, estimator: str, coefficient: float) -> Tensor:
    """What each token earns for leaving the reference: -coefficient * KL_t, [T], without gradient.

    KL in the reward (Ziegler et al., arXiv 1909.08593, eq. 2; Ouyang et al., arXiv 2203.02155, section 3.5).
    """
    return -coefficient * kl_estimate(log_probs, reference_log_probs, estimator).detach()


def next_kl_coefficient(coefficient: float, kl: float, *, target: float, horizon: int, samples: int) -> float:
    """The coefficient of the next step: beta * (1 + clip(kl / target - 1, +-0.2) * samples / horizon).

    The log-space proportional controller of Ziegler et al., arXiv 1909.08593, section 2.2, with the gain written as
    samples / horizon (their K_beta = 0.1 a batch). A target of 0 keeps the coefficient as it is.

    Args: kl: mean of the step, nats a token. target: nats a token. horizon, samples: in samples.
    Raises: ValueError when kl is not finite.
    """
    if not target:
        return coefficient
    if kl != kl or kl in (float("inf"), float("-inf")):
        raise ValueError(f"a KL divergence of {kl} can't steer its coefficient")
    error = min(max(kl / target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * max(1.0 + error * samples / horizon, 0.0)
