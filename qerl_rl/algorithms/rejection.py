"""Tokens and whole sequences that are not learned from, since rollout engine and trainer differ too much on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT
from qerl_rl.algorithms.sequences import sequence_count, sequence_means, sequence_sums
from qerl_rl.config.learning_schema import RolloutCorrectionConfig


def divergences(learner_log_probs: Tensor, rollout_log_probs: Tensor, kind: str) -> Tensor:
    """How far both engines are apart at each token: [T], without gradient; x = log p_learner - log p_rollout.

    k1 = -x, k2 = x^2 / 2, k3 = e^x - 1 - x (Schulman, "Approximating KL divergence", 2020), x cut off at
    +-LOG_RATIO_LIMIT. binary_kl: the larger of both KL divergences between coins that fall on the token with
    p_learner and p_rollout (KPop, which pull request 6800 proposes for verl).

    Raises: ValueError for another kind.
    """
    x = (learner_log_probs - rollout_log_probs).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -x
    if kind == "k2":
        return x.square() / 2.0
    if kind == "k3":
        return x.expm1() - x
    if kind == "binary_kl":
        p, q = (one.detach().double().exp().clamp(1e-6, 1 - 1e-6) for one in (learner_log_probs, rollout_log_probs))
        forward, backward = (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log() for a, b in ((p, q), (q, p)))
        return torch.maximum(forward, backward).to(x.dtype)
    raise ValueError(f"divergence {kind!r} is none of k1, k2, k3, binary_kl")


def kept_by(
    learner_log_probs: Tensor, rollout_log_probs: Tensor, ids: Tensor, *, criterion: str, low: float, high: float
) -> Tensor:
    """Which tokens a criterion keeps: bool [T], the same for all tokens of a sequence where it judges sequences.

    Criteria have verl's names: token_K judges each token, seq_sum_K, seq_mean_K and seq_max_K the sum, mean or largest
    divergence of a sequence, K being k1, k2 or k3; binary_kl judges tokens. The band of k1 is one of ratios, low <=
    e^(statistic) <= high with e^k1 = p_rollout / p_learner; seq_mean_k1 is that of geometric means (Geo-RS: Liu, Li et
    al. 2025, "When Speed Kills Stability"), seq_sum_k1 that of whole sequences (Seq-MIS). The others keep what is at
    most high; seq_mean_k3 is K3-RS; seq_max_K rejects a sequence for its worst token, as Trust Region Masking does
    (Li et al., arXiv 2512.23075).

    Args: log-probs [T] in nats; ids int64 [T], counted from 0, every sequence whole.
    Raises: ValueError for another criterion.
    """
    reduction, _, kind = criterion.rpartition("_") if criterion != "binary_kl" else ("token", "", criterion)
    values = divergences(learner_log_probs, rollout_log_probs, kind)
    if reduction.startswith("seq_"):
        values = _by_sequence(values, ids, reduction.removeprefix("seq_"))[ids]
    elif reduction != "token":
        raise ValueError(f"criterion {criterion!r} judges neither tokens (token_...) nor sequences (seq_...)")
    if kind == "k1":
        return (values >= math.log(low)) & (values <= math.log(high))
    return values <= high


def _by_sequence(values: Tensor, ids: Tensor, reduction: str) -> Tensor:
    """Sum, mean or maximum of values [T] over each sequence."""
    count = sequence_count(ids)
    if reduction == "sum":
        return sequence_sums(values, ids, count)
    if reduction == "mean":
        return sequence_means(values, ids, count)
    if reduction == "max":
        return values.new_full((count,), -torch.inf).scatter_reduce(0, ids, values, "amax")
    raise ValueError(f"reduction {reduction!r} is none of sum, mean, max")


def kept_tokens(
    learner_log_probs: Tensor, rollout_log_probs: Tensor, ids: Tensor, correction: RolloutCorrectionConfig
) -> Tensor:
    """Which tokens pass every criterion of correction.rollout_rs and the veto: bool [T].

    The veto of correction.rollout_token_veto_threshold rejects a sequence if p_learner / p_rollout of one of its tokens
    is below it: the trainer would hardly have drawn that token at all (verl's token veto).
    """
    kept = torch.ones_like(ids, dtype=torch.bool)
    for criterion, low, high in correction.rs_bands:
        kept &= kept_by(learner_log_probs, rollout_log_probs, ids, criterion=criterion, low=low, high=high)
    veto = correction.rollout_token_veto_threshold
    if veto > 0.0:
        vetoed = (learner_log_probs - rollout_log_probs).detach() < math.log(veto)
        kept &= sequence_sums(vetoed.float(), ids, sequence_count(ids))[ids] == 0.0
    return kept


def sequences_with_rejected_tokens(kept: Tensor, ids: Tensor) -> int:
    """How many sequences lost a token or all of them; kept bool [T], ids int [T]."""
    return int((sequence_sums((~kept).float(), ids, sequence_count(ids)) > 0).sum())
