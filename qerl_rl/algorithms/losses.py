"""Policy-gradient losses by token, and the clipped value loss.

Each policy loss is a sum over the T tokens of w_t * l_t, so micro-batches add up; its metrics are sums over the tokens,
not weighted, without gradient: `policy_loss` (l_t), `ratio`, `clip_fraction` (tokens whose gradient the clip removed or
whose weight it changed), `approx_kl` (k3 estimate of KL(old || new), nats).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qerl_rl.algorithms.sequences import sequence_count, sequence_means

LOG_RATIO_LIMIT = 20.0
"""|log ratio| beyond which exp() is cut off, so that one absurd token gives a large loss, not inf and then nan."""

Loss = tuple[Tensor, dict[str, Tensor]]


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """Sum over tokens of w_t * max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)), r_t = exp(new - old).

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with separate bounds (DAPO, arXiv 2503.14476, eq. 10). A positive
    advantage is cut off above 1 + clip_high, a negative one below 1 - clip_low; the other side is never clipped.

    Args: log_probs [T] with gradient; old_log_probs, advantages, token_weights [T], constants.
    Returns: (scalar loss, metrics).
    """
    log_ratio, ratio = _ratio(log_probs, old_log_probs)
    token_losses, clipped = _surrogate(ratio, advantages, clip_low, clip_high)
    return (token_weights * token_losses).sum(), _metrics(token_losses, ratio, clipped, log_ratio)


def dual_clip_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Loss:
    """`clipped_policy_loss` whose token loss is at most -dual_clip * A_t where A_t < 0.

    A token that the new policy likes far more than the old one did, and that turned out bad, would else give a loss
    without bound (Ye et al., "Mastering Complex Control in MOBA Games", arXiv 1912.09729, dual-clip PPO).

    Args: as `clipped_policy_loss`; dual_clip above 1, the largest ratio that counts against a bad token.
    Returns: (scalar loss, metrics), with `dual_clip_fraction`: tokens that this bound stopped, of `clip_fraction`.
    """
    log_ratio, ratio = _ratio(log_probs, old_log_probs)
    single, clipped = _surrogate(ratio, advantages, clip_low, clip_high)
    bound = -dual_clip * advantages
    stopped = (advantages < 0) & (single > bound)
    token_losses = torch.where(stopped, bound, single)
    metrics = _metrics(token_losses, ratio, clipped | stopped, log_ratio)
    metrics["dual_clip_fraction"] = stopped.to(ratio.dtype).sum()
    return (token_weights * token_losses).sum(), metrics


def sequence_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    sequence_ids: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """GSPO: the clipped surrogate with one ratio a sequence, s_i = exp(mean over its tokens of (new - old)).

    Zheng et al., arXiv 2507.18071, eq. 7 for s_i and eq. 5 for the objective, which sequence_mean weights give. Its
    token form (GSPO-token, eq. 14) s_(i,t) = stop(s_i) * p_t / stop(p_t) is used: same value, and the same gradient
    where a sequence has one advantage. Bounds are much tighter than PPO's: the paper takes 3e-4 and 4e-4.

    Args: as `clipped_policy_loss`; sequence_ids int64 [T], counted from 0, every sequence whole in this micro-batch.
    Returns: (scalar loss, metrics); `ratio` is that of the sequence, on each token.
    """
    log_ratio = (log_probs - old_log_probs).detach()
    mean = sequence_means(log_ratio, sequence_ids, sequence_count(sequence_ids))[sequence_ids]
    mean = mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = (mean + log_probs - log_probs.detach()).exp()
    token_losses, clipped = _surrogate(ratio, advantages, clip_low, clip_high)
    limited = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return (token_weights * token_losses).sum(), _metrics(token_losses, ratio, clipped, limited)


def clipped_weight_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> Loss:
    """CISPO: sum over tokens of -w_t * stop(clip(r_t, 1 - clip_low, 1 + clip_high)) * A_t * log p_t.

    MiniMax-M1 (arXiv 2506.13585, eq. 4 and 5): the importance weight is clipped, never the token's gradient; the paper
    leaves the lower bound open (clip_low of 1 or more does).

    Args: as `clipped_policy_loss`.
    Returns: (scalar loss, metrics).
    """
    log_ratio, ratio = (part.detach() for part in _ratio(log_probs, old_log_probs))
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_losses = -weight * advantages * log_probs
    return (token_weights * token_losses).sum(), _metrics(token_losses, ratio, weight != ratio, log_ratio)


def plain_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, token_weights: Tensor) -> Loss:
    """REINFORCE: sum over tokens of -w_t * A_t * log p_t (Williams 1992, "Simple statistical gradient-following
    algorithms for connectionist reinforcement learning"); nothing is clipped.

    Args: as `clipped_policy_loss`; old_log_probs are for the metrics only.
    Returns: (scalar loss, metrics); `clip_fraction` is 0.
    """
    log_ratio, ratio = (part.detach() for part in _ratio(log_probs, old_log_probs))
    token_losses = -advantages * log_probs
    return (token_weights * token_losses).sum(), _metrics(token_losses, ratio, torch.zeros_like(ratio), log_ratio)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, token_weights: Tensor, *, clip: float
) -> Loss:
    """Sum over tokens of w_t * max((V_t - R_t)^2, (V'_t - R_t)^2) / 2, V'_t = old_V_t + clip(V_t - old_V_t, +-clip).

    The value loss of OpenAI's PPO implementation (baselines `ppo2`; Engstrom et al., arXiv 2005.12729, section 3): the
    critic moves at most `clip` an update towards the returns.

    Args: values [T] with gradient; old_values, returns, token_weights [T], constants; clip above 0.
    Returns: (scalar loss, metrics): sums over tokens `value_loss`, `value_clip_fraction`, `value` (V).
    """
    change = values - old_values
    # old + (V - old) rounds: a value within the clip must stay itself, or half of these would count as clipped.
    near = torch.where(change.abs() <= clip, values, old_values + change.clamp(-clip, clip))
    free, limited = (values - returns).square() / 2.0, (near - returns).square() / 2.0
    token_losses = torch.maximum(free, limited)
    metrics = {
        "value_loss": token_losses.detach().sum(),
        "value_clip_fraction": (limited > free).to(values.dtype).sum(),
        "value": values.detach().sum(),
    }
    return (token_weights * token_losses).sum(), metrics


def _ratio(log_probs: Tensor, old_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """(log ratio within LOG_RATIO_LIMIT, ratio), [T] each."""
    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio, log_ratio.exp()


def _surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """(token losses [T], whether the clip removed the gradient, bool [T])."""
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(free, clipped), clipped > free


def _metrics(token_losses: Tensor, ratio: Tensor, clipped: Tensor, log_ratio: Tensor) -> dict[str, Tensor]:
    ratio, log_ratio = ratio.detach(), log_ratio.detach()
    return {
        "policy_loss": token_losses.detach().sum(),
        "ratio": ratio.sum(),
        "clip_fraction": clipped.to(ratio.dtype).sum(),
        "approx_kl": (log_ratio.exp() - 1.0 - log_ratio).sum(),
    }
