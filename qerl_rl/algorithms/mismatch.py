"""How far the engine that sampled the tokens is from the trainer that learns from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT

SECTION = "rollout_vs_train"
"""Of the metrics."""
_SUMS = f"{SECTION}/sum_of_"
"""Begins what ranks tell: sums over the tokens (or samples) of a rank, divided by its tokens."""
REJECTED_SAMPLES = f"{_SUMS}rejected_samples"
"""Such a sum: samples of which a correction rejects a token or all."""


def rollout_mismatch(rollout_log_probs: Sequence[ArrayLike], train_log_probs: Sequence[ArrayLike]) -> dict[str, float]:
    """Compare what both engines gave the same response tokens, over all tokens of all samples.

    With r = p_train / p_rollout of a token, names begin with `rollout_vs_train/` (definitions and most names are those
    of verl's `rollout_corr` and `training` metrics):
    `kl` E[log p_rollout - log p_train], KL(rollout || train) in nats, since tokens are samples of the rollout engine;
    `k3_kl` E[r - 1 - log r], the same with less variance (Schulman 2020);
    `prob_diff_mean`, `prob_diff_max` of |p_rollout - p_train|;
    `pearson` correlation of both probabilities (MiniMax-M1, arXiv 2506.13585), nan where one of them does not vary;
    `ess` (sum r)^2 / (T sum r^2), Kish's effective share of the T tokens, by token and not truncated;
    `ppl_ratio` mean over samples of perplexity_train / perplexity_rollout, exp(mean of log p_rollout - log p_train).

    Args: one array [tokens] a sample, log-probs of the rollout engine and of the trainer before its update.
    Raises: ValueError when the lengths of a sample differ or there is no token.
    """
    return finish_mismatch(partial_mismatch(rollout_log_probs, train_log_probs))


def partial_mismatch(rollout_log_probs: Sequence[ArrayLike], train_log_probs: Sequence[ArrayLike]) -> dict[str, float]:
    """What each rank has to tell of its samples, so that `finish_mismatch` gives what one rank with all would.

    Every number is a sum over the rank's tokens or samples divided by its tokens: over ranks, average them with the
    tokens as weights; those whose name ends in `_max` are maxima. Args, Raises: as `rollout_mismatch`.
    """
    sampled, learned = _tokens(rollout_log_probs, train_log_probs)
    difference = sampled - learned
    ratio = np.exp(np.clip(-difference, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    # Of 1 - p, since most probabilities are near 1, where squares of p would lose all digits of the variance.
    left, right = -np.expm1(sampled), -np.expm1(learned)
    lengths = [len(np.asarray(row).reshape(-1)) for row in train_log_probs]
    by_sample = np.split(difference, np.cumsum(lengths)[:-1])
    perplexities = sum(math.exp(min(row.mean(), LOG_RATIO_LIMIT)) for row in by_sample if len(row))
    sums = {
        "ratios": ratio,
        "squared_ratios": ratio**2,
        "rollout": left,
        "train": right,
        "squared_rollout": left**2,
        "squared_train": right**2,
        "products": left * right,
    }
    return {
        f"{SECTION}/kl": float(difference.mean()),
        f"{SECTION}/k3_kl": _k3(sampled, learned),
        f"{SECTION}/prob_diff_mean": float(np.abs(left - right).mean()),
        f"{SECTION}/prob_diff_max": float(np.abs(left - right).max()),
        **{f"{_SUMS}{name}": float(values.mean()) for name, values in sums.items()},
        f"{_SUMS}ppl_ratios": perplexities / len(sampled),
        f"{_SUMS}samples": sum(map(bool, lengths)) / len(sampled),
    }


def finish_mismatch(metrics: Mapping[str, float]) -> dict[str, float]:
    """`pearson`, `ess` and `ppl_ratio` in place of the sums of `partial_mismatch`; other metrics stay as they are.

    `REJECTED_SAMPLES` becomes `rollout_correction/rs_sequences_masked`, the share of samples.
    """
    sums = {name.removeprefix(_SUMS): value for name, value in metrics.items() if name.startswith(_SUMS)}
    found = {name: value for name, value in metrics.items() if not name.startswith(_SUMS)}
    if not sums:
        return found
    variances = [_variance(sums[f"squared_{side}"], sums[side]) for side in ("rollout", "train")]
    spread = math.sqrt(variances[0] * variances[1])
    covariance = sums["products"] - sums["rollout"] * sums["train"]
    if "rejected_samples" in sums:
        found["rollout_correction/rs_sequences_masked"] = sums["rejected_samples"] / sums["samples"]
    return found | {
        f"{SECTION}/pearson": covariance / spread if spread else math.nan,
        f"{SECTION}/ess": sums["ratios"] ** 2 / sums["squared_ratios"],
        f"{SECTION}/ppl_ratio": sums["ppl_ratios"] / sums["samples"],
    }


def _variance(mean_square: float, mean: float) -> float:
    """mean_square - mean^2; 0 where that is no more than what rounding leaves of equal numbers."""
    variance = mean_square - mean**2
    return variance if variance > 1e-13 * mean_square else 0.0


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
