"""Importance weights for tokens that another policy sampled than the one that learns from them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT
from qerl_rl.algorithms.sequences import sequence_sums
from qerl_rl.config.learning_schema import RolloutCorrectionConfig

TOKEN, SEQUENCE = "token", "sequence"
SECTION = "rollout_correction"
"""Of the launch file, and of the metrics."""


def importance_ratios(old_log_probs: Tensor, rollout_log_probs: Tensor, sequence_ids: Tensor, *, level: str) -> Tensor:
    """w_t = p_old(t) / p_rollout(t) of each token, or their product over its sequence on each of its tokens; [T].

    Tokens that mu = p_rollout sampled stand for those of pi = p_old when each counts w = pi / mu; by token the weight
    of the prefix is left out, which has less variance and some bias (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). The log of a weight is cut off at +-LOG_RATIO_LIMIT.

    Args: old_log_probs [T] of the trainer before its update and rollout_log_probs [T] of what sampled, in nats;
        sequence_ids int64 [T], counted from 0, every sequence whole. level: token or sequence.
    Returns: [T], without gradient.
    Raises: ValueError for another level.
    """
    log_ratios = (old_log_probs - rollout_log_probs).detach()
    if level == SEQUENCE:
        count = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
        log_ratios = sequence_sums(log_ratios, sequence_ids, count)[sequence_ids]
    elif level != TOKEN:
        raise ValueError(f"level {level!r} is neither {TOKEN} nor {SEQUENCE}")
    return log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated(ratios: Tensor, threshold: float) -> Tensor:
    """min(w, threshold): truncated importance sampling, the rho of IMPALA (arXiv 1802.01561, eq. 1). [T] to [T]."""
    return ratios.clamp(max=threshold)


def corrected_weights(
    token_weights: Tensor, columns: Mapping[str, Tensor], correction: RolloutCorrectionConfig
) -> Tensor:
    """What each token's policy loss counts: token_weights [T] times its truncated importance weight.

    With correction.rollout_is == "none" they are what was given. Otherwise it needs the columns `old_log_probs`,
    `rollout_log_probs` and `sequence_ids`, [T] each.
    """
    if correction.rollout_is == "none":
        return token_weights
    ratios = importance_ratios(
        columns["old_log_probs"], columns["rollout_log_probs"], columns["sequence_ids"], level=correction.rollout_is
    )
    return token_weights * truncated(ratios, correction.rollout_is_threshold)


def weight_metrics(ratios: Tensor, threshold: float) -> dict[str, float]:
    """Of importance ratios [T]: mean, mean square and largest of the truncated weights, and the share cut off.

    Names begin with `rollout_correction/`: `is_mean`, `is_square_mean`, `is_max`, `is_clipped`.
    """
    weights = truncated(ratios.double(), threshold)
    found = {
        "is_mean": weights.mean(),
        "is_square_mean": weights.square().mean(),
        "is_max": weights.max(),
        "is_clipped": (ratios > threshold).double().mean(),
    }
    return {f"{SECTION}/{name}": float(value) for name, value in found.items()}


def with_effective_share(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same with `ess`, in place of `is_square_mean`: the share of tokens that count, (sum w)^2 / (T sum w^2).

    1 where all weights are equal, 1 / T where one token outweighs the others (Kish's effective sample size over T).
    Metrics without weights come back as they are.
    """
    found = dict(metrics)
    square = found.pop(f"{SECTION}/is_square_mean", None)
    if square is not None:
        found[f"{SECTION}/ess"] = found[f"{SECTION}/is_mean"] ** 2 / square if square else 0.0
    return found
