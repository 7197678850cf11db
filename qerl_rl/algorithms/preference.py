"""Losses that learn from pairs of responses, one chosen and one rejected.

All take log-probs of whole responses, summed over their tokens, and see them only through the margin
h = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

Loss = tuple[Tensor, dict[str, Tensor]]


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> Loss:
    """DPO: sum over pairs of -log sigmoid(beta * h) (Rafailov et al., arXiv 2305.18290, eq. 7).

    Args: chosen, rejected [P] with gradient, reference_chosen, reference_rejected [P], constants; beta above 0.
    Returns: (scalar loss, metrics): sums over the P pairs `preference_loss`, `reward_chosen` and `reward_rejected`
        (beta * log ratio), `reward_margin`, `accuracy` (pairs with a positive margin).
    Raises: ValueError when shapes differ.
    """
    return conservative_dpo_loss(
        chosen, rejected, reference_chosen, reference_rejected, beta=beta, flip_probability=0.0
    )


def conservative_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    flip_probability: float,
) -> Loss:
    """cDPO: sum over pairs of -(1 - e) log sigmoid(beta * h) - e log sigmoid(-beta * h), e = flip_probability.

    DPO where a label is wrong with probability e (Mitchell, "A note on DPO with noisy preferences", 2023); the loss is
    least at sigmoid(beta * h) = 1 - e instead of at an infinite margin.

    Args, Returns, Raises: as `dpo_loss`; flip_probability in [0, 0.5).
    """
    if not 0.0 <= flip_probability < 0.5:
        raise ValueError(f"flip_probability {flip_probability} is not within 0 and below 0.5")
    margins, metrics = _margins(chosen, rejected, reference_chosen, reference_rejected, beta)
    losses = -(1.0 - flip_probability) * logsigmoid(margins)
    if flip_probability:
        losses = losses - flip_probability * logsigmoid(-margins)
    return losses.sum(), metrics | {"preference_loss": losses.detach().sum()}


def ipo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, *, beta: float
) -> Loss:
    """IPO: sum over pairs of (h - 1 / (2 beta))^2 (Azar et al., arXiv 2310.12036, eq. 17, beta for its tau).

    The margin is drawn to a finite value, also where one response always wins.

    Args, Returns, Raises: as `dpo_loss`.
    """
    margins, metrics = _margins(chosen, rejected, reference_chosen, reference_rejected, beta)
    losses = (margins / beta - 1.0 / (2.0 * beta)).square()
    return losses.sum(), metrics | {"preference_loss": losses.detach().sum()}


def _margins(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    shapes = {tuple(part.shape) for part in (chosen, rejected, reference_chosen, reference_rejected)}
    if len(shapes) > 1 or chosen.ndim != 1:
        raise ValueError(f"all four log-probs must be [P], got {sorted(map(list, shapes))}")
    good, bad = beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)
    margins = good - bad
    metrics = {
        "reward_chosen": good.detach().sum(),
        "reward_rejected": bad.detach().sum(),
        "reward_margin": margins.detach().sum(),
        "accuracy": (margins.detach() > 0).to(margins.dtype).sum(),
    }
    return margins, metrics
