"""The clipped policy-gradient loss."""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""|log ratio| beyond which exp() is cut off, so that one absurd token gives a large loss, not inf and then nan."""


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum over tokens of w_t * max(-A_t r_t, -A_t clip(r_t, 1 - clip_low, 1 + clip_high)), r_t = exp(new - old).

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with separate bounds (DAPO, arXiv 2503.14476, eq. 10). A positive
    advantage is cut off above 1 + clip_high, a negative one below 1 - clip_low; the other side is never clipped.

    Args: log_probs [T] with gradient; old_log_probs, advantages, token_weights [T], constants.
    Returns: (scalar loss, metrics): sums over the T tokens, not weighted, no gradient: `policy_loss`, `ratio`,
        `clip_fraction` (tokens whose gradient the clip removed), `approx_kl` (k3 estimate of KL(old || new), nats).
    """
    log_ratio = (log_probs - old_log_probs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_losses = torch.maximum(free, clipped)
    metrics = {
        "policy_loss": token_losses.detach().sum(),
        "ratio": ratio.detach().sum(),
        "clip_fraction": (clipped > free).to(ratio.dtype).sum(),
        "approx_kl": (ratio - 1.0 - log_ratio).detach().sum(),
    }
    return (token_weights * token_losses).sum(), metrics
