"""The advantages and policy losses that a launch file can name, each with its constants out of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qerl_rl.algorithms import advantages as adv
from qerl_rl.algorithms import losses
from qerl_rl.config.dotted import find_function
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import AlgorithmConfig

AdvantageFunction = Callable[[adv.Outcome, AlgorithmConfig], Tensor]
"""(outcome, config) -> one advantage a sample [S], or one a token [T]."""
PolicyLoss = Callable[[Tensor, Mapping[str, Tensor], Tensor, AlgorithmConfig], tuple[Tensor, dict[str, Tensor]]]
"""(log_probs [T], columns {name: [T]}, token_weights [T], config) -> (sum of w_t * l_t, metrics as sums over tokens).

columns holds old_log_probs, advantages, reference_log_probs (all float32) and sequence_ids (int64, from 0).
"""


def _grpo(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    return adv.group_advantages(outcome.totals(), outcome.group_ids, normalize_std=config.normalize_std)


def _dr_grpo(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    return adv.group_advantages(outcome.totals(), outcome.group_ids, normalize_std=False)


def _rloo(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    return adv.leave_one_out_advantages(outcome.totals(), outcome.group_ids)


def _reinforce_plus_plus(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    return adv.reinforce_plus_plus_advantages(
        outcome.rewards, outcome.lengths, outcome.token_rewards, discount=config.discount
    )


def _reinforce_plus_plus_baseline(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    return adv.reinforce_plus_plus_baseline_advantages(outcome.totals(), outcome.group_ids, outcome.lengths)


def _token_loss(function: Callable[..., losses.Loss], *constants: str) -> PolicyLoss:
    """A loss over tokens, called with the named keys of the configuration."""

    def loss(
        log_probs: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor, config: AlgorithmConfig
    ) -> losses.Loss:
        named = {name: getattr(config, name) for name in ("clip_low", "clip_high", *constants)}
        return function(log_probs, columns["old_log_probs"], columns["advantages"], token_weights, **named)

    return loss


def _gspo(
    log_probs: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor, config: AlgorithmConfig
) -> losses.Loss:
    return losses.sequence_policy_loss(
        log_probs,
        columns["old_log_probs"],
        columns["advantages"],
        token_weights,
        columns["sequence_ids"],
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
    "reinforce_plus_plus": _reinforce_plus_plus,
    "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline,
}
LOSSES: dict[str, PolicyLoss] = {
    "ppo": _token_loss(losses.clipped_policy_loss),
    "dual_clip": _token_loss(losses.dual_clip_policy_loss, "dual_clip"),
    "gspo": _gspo,
    "cispo": _token_loss(losses.clipped_weight_policy_loss),
}


def reinforce_loss(
    log_probs: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor, config: AlgorithmConfig
) -> losses.Loss:
    """What rollout_correction.loss_type=reinforce puts in the place of `algorithm.loss`."""
    return losses.plain_policy_loss(log_probs, columns["old_log_probs"], columns["advantages"], token_weights)


def find_advantage(name: str) -> AdvantageFunction:
    """The function that `algorithm.advantage` names. Raises: ConfigError, as `find_function`."""
    return find_function("algorithm.advantage", name, ADVANTAGES, ("outcome", "config"))


def find_loss(name: str) -> PolicyLoss:
    """The function that `algorithm.loss` names. Raises: ConfigError, as `find_function`."""
    return find_function("algorithm.loss", name, LOSSES, ("log_probs", "columns", "token_weights", "config"))


def advantages_by_token(outcome: adv.Outcome, config: AlgorithmConfig) -> Tensor:
    """What `algorithm.advantage` gives these samples, float32 on each token: [T].

    Raises: ConfigError when the function gives neither one finite number a sample nor one a token.
    """
    found = find_advantage(config.advantage)(outcome, config)
    samples, tokens = len(outcome.rewards), int(outcome.lengths.sum())
    if found.shape not in ((samples,), (tokens,)):
        raise ConfigError(
            f"algorithm.advantage={config.advantage} gave {list(found.shape)} for {samples} samples, {tokens} tokens.",
            fix=f"let it return one advantage a sample, [{samples}], or one a token, [{tokens}]",
        )
    broken = int((~torch.isfinite(found)).sum())
    if broken:
        raise ConfigError(
            f"algorithm.advantage={config.advantage} gave {broken} advantages that are not finite.",
            fix="let it return finite numbers, also for a group whose rewards are all equal",
        )
    # Where every response has one token, both readings agree.
    return (found if len(found) == tokens else found.repeat_interleave(outcome.lengths)).float()
