"""Importance weights for tokens that another policy sampled than the one that learns from them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qerl_rl.algorithms.losses import LOG_RATIO_LIMIT
from qerl_rl.algorithms.rejection import kept_tokens
from qerl_rl.algorithms.sequences import sequence_count, sequence_means, sequence_sums
from qerl_rl.config.learning_schema import RolloutCorrectionConfig

TOKEN, SEQUENCE = "token", "sequence"
SECTION = "rollout_correction"
"""Of the launch file, and of the metrics."""
NO_WEIGHT = 1e-8
"""A mean weight up to this divides nothing: all weights are (nearly) 0."""


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
        log_ratios = sequence_sums(log_ratios, sequence_ids, sequence_count(sequence_ids))[sequence_ids]
    elif level != TOKEN:
        raise ValueError(f"level {level!r} is neither {TOKEN} nor {SEQUENCE}")
    return log_ratios.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def limited(ratios: Tensor, low: float, high: float) -> Tensor:
    """The weights that importance ratios count with: [T] to [T].

    low 0: min(w, high), truncated importance sampling, the rho of IMPALA (arXiv 1802.01561, eq. 1). low above 0: w
    inside [low, high] and 0 outside, the masking of IcePop (Ling Team, "Every Step Evolves", arXiv 2510.18855): a token
    on which the engines differ that much teaches nothing.
    """
    if low == 0.0:
        return ratios.clamp(max=high)
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


def weight_sums(ratios: Tensor, ids: Tensor, correction: RolloutCorrectionConfig) -> tuple[float, int]:
    """(sum of the limited weights, what it is a sum over): tokens, or sequences where correction.rollout_is=sequence.

    Both add up over micro-batches and ranks; `mean_weight` makes the mean of the whole batch of them. A sequence counts
    once, however long it is; tokens that are rejected count as well, as in verl.

    Args: ratios [T] of `importance_ratios` and ids int64 [T], counted from 0, every sequence whole.
    """
    weights = limited(ratios.double(), *correction.is_band)
    if correction.rollout_is == SEQUENCE:
        found = ids.unique()
        return float(sequence_means(weights, ids, sequence_count(ids))[found].sum()), len(found)
    return float(weights.sum()), len(weights)


def mean_weight(total: float, count: float) -> float:
    """What `corrected_weights` divides by, from the sums of `weight_sums`; 1 where there is no weight to speak of."""
    mean = total / count if count else 0.0
    return mean if mean > NO_WEIGHT else 1.0


def corrected_weights(
    log_probs: Tensor,
    columns: Mapping[str, Tensor],
    token_weights: Tensor,
    correction: RolloutCorrectionConfig,
    *,
    weight_mean: float | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What each token counts in an update: (in the policy loss [T], in its other terms [T], metrics).

    Rejected tokens (`qerl_rl.algorithms.rejection`) count nothing in either; the importance weight is on the policy
    loss alone. Neither changes what sums are divided by, so that a step with everything rejected has the loss 0.
    With correction.rollout_is_batch_normalize the weights are divided by weight_mean, that of the limited weights of
    the whole batch (`mean_weight`), which makes 1 their mean (verl's "batch normalization" of weights).
    Metrics, sums over the tokens: `rollout_correction/rs_masked`, tokens rejected, where something can be;
    `rollout_correction/is_batch_norm_factor`, weight_mean on each token, where it divides.

    Args: log_probs [T] of the policy that is updated. columns: `old_log_probs`, `rollout_log_probs` and
        `sequence_ids`, [T] each, where correction.compares. In bypass_mode, where the old log-probs are the engine's,
        rejection and weights compare the updated policy with it (as verl does).
    Raises: ValueError when the weights are to be normalized and weight_mean is not given.
    """
    if not correction.compares:
        return token_weights, token_weights, {}
    rollout, ids = columns["rollout_log_probs"], columns["sequence_ids"]
    learner = log_probs.detach() if correction.bypass_mode else columns["old_log_probs"]
    metrics: dict[str, Tensor] = {}
    if correction.rejects:
        kept = kept_tokens(learner, rollout, ids, correction)
        token_weights = token_weights * kept
        metrics[f"{SECTION}/rs_masked"] = (~kept).to(token_weights.dtype).sum()
    if correction.rollout_is == "none":
        return token_weights, token_weights, metrics
    ratios = importance_ratios(learner, rollout, ids, level=correction.rollout_is)
    weights = limited(ratios, *correction.is_band)
    if correction.rollout_is_batch_normalize:
        if weight_mean is None:
            raise ValueError(f"{SECTION}.rollout_is_batch_normalize needs weight_mean, that of the whole batch")
        weights = weights / weight_mean
        metrics[f"{SECTION}/is_batch_norm_factor"] = torch.tensor(weight_mean * len(weights), dtype=torch.float64)
    return token_weights * weights, token_weights, metrics


def weight_metrics(ratios: Tensor, low: float, high: float) -> dict[str, float]:
    """Of importance ratios [T]: mean, mean square and largest of the limited weights, and the share that was changed.

    Names begin with `rollout_correction/`: `is_mean`, `is_square_mean`, `is_max`, `is_clipped` (outside the band; with
    low 0, above the threshold).
    """
    weights = limited(ratios.double(), low, high)
    found = {
        "is_mean": weights.mean(),
        "is_square_mean": weights.square().mean(),
        "is_max": weights.max(),
        "is_clipped": ((ratios > high) | (ratios < low)).double().mean(),
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
