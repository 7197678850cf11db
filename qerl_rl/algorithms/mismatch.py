"""How far the engine that sampled the tokens is from the trainer that learns from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT


def rollout_mismatch(rollout_log_probs: Sequence[ArrayLike], old_log_probs: Sequence[ArrayLike]) -> dict[str, float]:
    """Compare what both engines gave the same response tokens, over all tokens of all samples.

    Args: one array [tokens] a sample, log-probs of the rollout engine and of the trainer before its update.
    Returns: `mismatch/kl`: KL(rollout || trainer) in nats by k3 = e^x - 1 - x, x = trainer - rollout (Schulman 2020;
        tokens are samples of the rollout engine); `mismatch/prob_diff_mean` and `_max`: |p_rollout - p_trainer|;
        `mismatch/log_prob_diff_mean`: |log p_rollout - log p_trainer|.
    Raises: ValueError when the lengths of a sample differ or there is no token.
    """
    rollout = [np.asarray(values, dtype=np.float64).reshape(-1) for values in rollout_log_probs]
    trainer = [np.asarray(values, dtype=np.float64).reshape(-1) for values in old_log_probs]
    lengths = [(len(left), len(right)) for left, right in zip(rollout, trainer, strict=True)]
    unequal = [index for index, (left, right) in enumerate(lengths) if left != right]
    if unequal:
        left, right = lengths[unequal[0]]
        raise ValueError(f"sample {unequal[0]} has {left} rollout log-probs but {right} old log-probs")
    if not sum(left for left, _ in lengths):
        raise ValueError("no response token to compare")

    sampled, learned = np.concatenate(rollout), np.concatenate(trainer)
    log_ratio = np.clip(learned - sampled, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    prob_difference = np.abs(np.exp(sampled) - np.exp(learned))
    return {
        "mismatch/kl": float(np.mean(np.expm1(log_ratio) - log_ratio)),
        "mismatch/prob_diff_mean": float(prob_difference.mean()),
        "mismatch/prob_diff_max": float(prob_difference.max()),
        "mismatch/log_prob_diff_mean": float(np.mean(np.abs(learned - sampled))),
    }
