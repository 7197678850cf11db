"""The GRPO loss: clipped policy gradient, KL to the reference, entropy bonus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qerl_rl.algorithms.kl import kl_estimate
from qerl_rl.algorithms.losses import clipped_policy_loss
from qerl_rl.config.schema import AlgorithmConfig

LossFunction = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(log_probs [T], entropy [T], columns {name: [T]}, token_weights [T]) -> (loss scalar, metrics {name: sum over T})."""


def grpo_loss(config: AlgorithmConfig) -> LossFunction:
    """The loss of GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3), as a function of the tokens of one micro-batch.

    loss = sum_t w_t (clipped policy loss_t + kl_coefficient * KL_t - entropy_coefficient * H_t)

    It needs the columns `old_log_probs` and `advantages`; `reference_log_probs` only where kl_coefficient > 0, but
    reports `kl/reference` whenever that column is there. Metrics are sums over tokens, not weighted: those of
    `clipped_policy_loss`, `entropy` (nats) and `kl/reference` (nats, by config.kl_estimator).
    Raises (when called): ValueError for a missing column.
    """
    needed = ["old_log_probs", "advantages"] + (["reference_log_probs"] if config.kl_coefficient else [])

    def loss_function(
        log_probs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(f"the GRPO loss needs the columns {missing}, got {sorted(columns)}")
        loss, metrics = clipped_policy_loss(
            log_probs,
            columns["old_log_probs"],
            columns["advantages"],
            token_weights,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        metrics["entropy"] = entropy.detach().sum()
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * (token_weights * entropy).sum()
        if "reference_log_probs" in columns:
            divergence = kl_estimate(log_probs, columns["reference_log_probs"], config.kl_estimator)
            metrics["kl/reference"] = divergence.detach().sum()
            if config.kl_coefficient:
                loss = loss + config.kl_coefficient * (token_weights * divergence).sum()
        return loss, metrics

    return loss_function
