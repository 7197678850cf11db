"""What PPO adds to a policy loss: advantages against a critic, and what the critic learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from qerl_rl.algorithms.advantages import Outcome, generalized_advantages, normalized
from qerl_rl.algorithms.losses import clipped_value_loss
from qerl_rl.config.schema import CriticConfig

GAE = "gae"
"""The one algorithm.advantage that takes a critic's values, and so belongs to algorithm.name=ppo."""

ValueLoss = Callable[[Tensor, Mapping[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]
"""(values [T], columns {name: [T]}, token_weights [T]) -> (loss scalar, metrics {name: sum over T})."""


def ppo_advantages(outcome: Outcome, values: Tensor, *, discount: float, decay: float) -> tuple[Tensor, Tensor]:
    """GAE against the critic, whitened over all tokens of the step, and the returns that the critic learns.

    Tokens earn token_rewards, the last one of a sample its reward too (Ouyang et al., arXiv 2203.02155, section 3.5).
    Returns are taken before the whitening: A_t + V_t of `generalized_advantages` (arXiv 1506.02438, eq. 16).

    Args: values [T], the critic's before each token.
    Returns: (advantages [T] with mean 0 and standard deviation 1, zeros when all are equal; returns [T]), float32.
    Raises: ValueError when shapes don't fit.
    """
    earned = outcome.by_token()
    advantages, returns = generalized_advantages(
        earned, values.double(), outcome.lengths, discount=discount, decay=decay
    )
    return normalized(advantages), returns.float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a critic that knows, 0 for one that says the same everywhere.

    Args: values, returns [T]. Returns: 0 where all returns are equal: there is nothing to explain.
    """
    spread = returns.double().var(correction=0)
    if not len(returns) or spread == 0:
        return 0.0
    return float(1.0 - (returns.double() - values.double()).var(correction=0) / spread)


def value_loss(config: CriticConfig) -> ValueLoss:
    """`clipped_value_loss` of the columns `values` (the critic's when the advantages were taken) and `returns`."""

    def loss_function(
        values: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return clipped_value_loss(values, columns["values"], columns["returns"], token_weights, clip=config.value_clip)

    return loss_function
