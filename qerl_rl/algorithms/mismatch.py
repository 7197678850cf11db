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
    sampled, learned = _tokens(rollout_log_probs, old_log_probs)
    prob_difference = np.abs(np.exp(sampled) - np.exp(learned))
    return {
        "mismatch/kl": _k3(sampled, learned),
        "mismatch/prob_diff_mean": float(prob_difference.mean()),
        "mismatch/prob_diff_max": float(prob_difference.max()),
        "mismatch/log_prob_diff_mean": float(np.mean(np.abs(learned - sampled))),
    }


def noise_mismatch(noisy_log_probs: Sequence[ArrayLike], clean_log_probs: Sequence[ArrayLike]) -> dict[str, float]:
    """`noise/kl`: KL(noisy || clean) in nats a token by k3, both by the trainer, of tokens sampled with the noise.

    Args, Raises: as `rollout_mismatch`.
    """
    return {"noise/kl": _k3(*_tokens(noisy_log_probs, clean_log_probs))}


def _k3(sampled: np.ndarray, other: np.ndarray) -> float:
    log_ratio = np.clip(other - sampled, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return float(np.mean(np.expm1(log_ratio) - log_ratio))


def _tokens(one: Sequence[ArrayLike], other: Sequence[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [tokens of all samples]."""
    rows = [[np.asarray(values, dtype=np.float64).reshape(-1) for values in part] for part in (one, other)]
    for index, (left, right) in enumerate(zip(*rows, strict=True)):
        if len(left) != len(right):
            raise ValueError(f"sample {index} has {len(left)} and {len(right)} log-probs")
    if not sum(map(len, rows[0])):
        raise ValueError("no response token to compare")
    return np.concatenate(rows[0]), np.concatenate(rows[1])
