"""The loss of an update from pairs of a chosen and a rejected response."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qerl_rl.algorithms.preference import Loss, conservative_dpo_loss, dpo_loss, ipo_loss
from qerl_rl.algorithms.sequences import sequence_sums
from qerl_rl.config.schema import DpoConfig

PreferenceLoss = Callable[[Tensor, Tensor, Tensor, Tensor, DpoConfig], Loss]
"""(chosen, rejected, reference_chosen, reference_rejected, each [P], config) -> (sum over pairs, metrics as sums)."""


def _dpo(chosen: Tensor, rejected: Tensor, good: Tensor, bad: Tensor, config: DpoConfig) -> Loss:
    return dpo_loss(chosen, rejected, good, bad, beta=config.beta)


def _ipo(chosen: Tensor, rejected: Tensor, good: Tensor, bad: Tensor, config: DpoConfig) -> Loss:
    return ipo_loss(chosen, rejected, good, bad, beta=config.beta)


def _cdpo(chosen: Tensor, rejected: Tensor, good: Tensor, bad: Tensor, config: DpoConfig) -> Loss:
    return conservative_dpo_loss(
        chosen, rejected, good, bad, beta=config.beta, flip_probability=config.flip_probability
    )


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {"dpo": _dpo, "ipo": _ipo, "cdpo": _cdpo}
_METRICS = {
    "preference_loss": "preference/loss",
    "accuracy": "preference/accuracy",
    "reward_margin": "preference/margin",
    "reward_chosen": "preference/reward_chosen",
    "reward_rejected": "preference/reward_rejected",
}


def pair_loss(config: DpoConfig) -> Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], Loss]:
    """The loss that dpo.loss names, as a function of the tokens of one micro-batch of whole pairs.

    Sequences 0 and 1, 2 and 3, ... of the micro-batch are the chosen and the rejected response of a pair; the loss sees
    the sums of their tokens' log-probs. It needs the columns `reference_log_probs` [T] and `sequence_ids` [T]; entropy
    and token weights play no part. Metrics are sums over pairs: `preference/loss`, `preference/accuracy` (pairs whose
    chosen response gained more on its reference than the rejected one), `preference/reward_chosen` and
    `preference/reward_rejected` (beta * log ratio to the reference), `preference/margin` (their difference).
    Raises: (when called) ValueError for a missing column, or an odd number of sequences.
    """
    loss_of_pairs = PREFERENCE_LOSSES[config.loss]

    def loss_function(
        log_probs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        missing = [name for name in ("reference_log_probs", "sequence_ids") if name not in columns]
        if missing:
            raise ValueError(f"the {config.loss} loss needs the columns {missing}, got {sorted(columns)}")
        ids = columns["sequence_ids"]
        count = int(ids[-1]) + 1
        if count % 2:
            raise ValueError(f"{count} sequences are no pairs")
        policy = sequence_sums(log_probs, ids, count)
        reference = sequence_sums(columns["reference_log_probs"], ids, count)
        loss, sums = loss_of_pairs(policy[::2], policy[1::2], reference[::2], reference[1::2], config)
        return loss, {_METRICS[name]: value for name, value in sums.items()}

    return loss_function
