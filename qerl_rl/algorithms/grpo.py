"""The loss of a step without a critic: a policy loss, KL to the reference, entropy bonus."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qerl_rl.algorithms.choices import find_loss, reinforce_loss
from qerl_rl.algorithms.correction import corrected_weights
from qerl_rl.algorithms.kl import kl_estimate
from qerl_rl.config.learning_schema import AlgorithmConfig, RolloutCorrectionConfig

LossFunction = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(log_probs [T], entropy [T], columns {name: [T]}, token_weights [T]) -> (loss scalar, metrics {name: sum over T})."""


def grpo_loss(
    config: AlgorithmConfig, correction: RolloutCorrectionConfig | None = None, *, weight_mean: float | None = None
) -> LossFunction:
    """The loss of GRPO (DeepSeekMath, arXiv 2402.03300, eq. 3), as a function of the tokens of one micro-batch.

    loss = sum_t w_t m_t (c_t policy loss_t + kl_coefficient * KL_t - entropy_coefficient * H_t)

    c_t is the importance weight that `correction` asks for (`qerl_rl.algorithms.correction`), and m_t is 0 for the
    tokens that it rejects; both are 1 without. weight_mean is what c_t is divided by where the correction normalizes
    it. config.loss names the policy loss, unless correction.loss_type is reinforce. With config.kl_in == "reward" the
    KL is in the advantages and not here.
    It needs the columns `old_log_probs` and `advantages`; gspo also `sequence_ids`, a correction these and
    `rollout_log_probs`; `reference_log_probs` only for a KL in the loss, but reports `kl/reference` whenever that
    column is there. Metrics are sums over tokens, not weighted: those of the policy loss, `entropy` (nats) and
    `kl/reference` (nats, by config.kl_estimator).
    Raises: ConfigError for a loss that does not exist; (when called) ValueError for a missing column.
    """
    correction = correction or RolloutCorrectionConfig()
    policy_loss = reinforce_loss if correction.is_reinforce else find_loss(config.loss)
    kl_coefficient = config.kl_coefficient if config.kl_in == "loss" else 0.0
    needed = ["old_log_probs", "advantages"]
    needed += ["reference_log_probs"] if kl_coefficient else []
    needed += ["rollout_log_probs"] if correction.compares else []
    needed += ["sequence_ids"] if config.loss == "gspo" or correction.compares else []

    def loss_function(
        log_probs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ValueError(f"the {config.loss} loss needs the columns {missing}, got {sorted(columns)}")
        policy_weights, token_weights, of_correction = corrected_weights(
            log_probs, columns, token_weights, correction, weight_mean=weight_mean
        )
        loss, metrics = policy_loss(log_probs, columns, policy_weights, config)
        metrics |= of_correction
        metrics["entropy"] = entropy.detach().sum()
        if config.entropy_coefficient:
            loss = loss - config.entropy_coefficient * (token_weights * entropy).sum()
        if "reference_log_probs" in columns:
            divergence = kl_estimate(log_probs, columns["reference_log_probs"], config.kl_estimator)
            metrics["kl/reference"] = divergence.detach().sum()
            if kl_coefficient:
                loss = loss + kl_coefficient * (token_weights * divergence).sum()
        return loss, metrics

    return loss_function
