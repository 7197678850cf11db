"""The routing rules as functions of logits. Import after prepare_megatron.

Choosing and weighing are apart, since routing replay replaces the choice and keeps the weights. All are deterministic:
log-probs taken twice are the same, and those of the engine, which chooses alike.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import sinkhorn

from qerl_rl.layout.routing import GROUP_LIMITED, SIGMOID, SINKHORN, SPARSE_MIXER, RoutingRule


def scores(rule: RoutingRule, logits: torch.Tensor) -> torch.Tensor:
    """What each of all experts scores: softmax or sigmoid of logits [T, E]."""
    return logits.sigmoid() if rule.scores == SIGMOID else logits.softmax(-1)


@torch.no_grad()
def choose(
    rule: RoutingRule, logits: torch.Tensor, *, training: bool, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The experts of each token, int64 [T, k], distinct, in the order of the rule.

    Args: logits float32 [T, E]. training: whether sinkhorn balances the tokens (else it takes the largest logits, as
        Megatron does). bias: float32 [E] that counts for the choice and not for the weights (DeepSeek-V3).
    """
    if rule.choice == SPARSE_MIXER:
        first = logits.argmax(-1, keepdim=True)
        return torch.cat([first, logits.scatter(1, first, -torch.inf).argmax(-1, keepdim=True)], 1)
    if rule.choice == SINKHORN and training and len(logits):
        return sinkhorn(logits).topk(rule.top_k, 1).indices
    ranked = logits if rule.scores != SIGMOID and rule.choice != GROUP_LIMITED else scores(rule, logits)
    if bias is not None:
        ranked = ranked + bias
    if rule.choice == GROUP_LIMITED:
        ranked = _within_best_groups(rule, ranked)
    return ranked.topk(rule.top_k, 1).indices


def _within_best_groups(rule: RoutingRule, ranked: torch.Tensor) -> torch.Tensor:
    """Scores [T, E], -inf outside the best groups (DeepSeek-V2, arXiv 2405.04434, section 2.2.2: device-limited)."""
    of_group = ranked.unflatten(1, (rule.groups, -1))
    best = of_group.topk(rule.best_of_group, -1).values.sum(-1).topk(rule.chosen_groups, 1).indices
    outside = torch.ones_like(of_group[..., 0], dtype=torch.bool).scatter(1, best, value=False)
    return of_group.masked_fill(outside[..., None], -torch.inf).flatten(1)


def weigh(rule: RoutingRule, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """How much each chosen expert counts, float32 [T, k], differentiable.

    Args: logits float32 [T, E]. experts int64 [T, k], by `choose` or forced.
    """
    if rule.choice == SPARSE_MIXER:
        return _against_near_rivals(rule, logits, experts) * rule.scaling
    if rule.scores == SIGMOID:
        weights = logits.sigmoid().gather(1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if rule.normalized else weights
    elif rule.normalized:
        weights = logits.gather(1, experts).softmax(-1)
    else:
        weights = logits.softmax(-1).gather(1, experts)
    return weights if rule.scaling == 1 else weights * rule.scaling


def _against_near_rivals(rule: RoutingRule, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """SparseMixer's weights (arXiv 2409.12136, section 2.2), as Phi-3.5-MoE computes them where nothing is sampled.

    An expert's weight is its share in the softmax over itself and the rivals that are near it; for the second expert
    the first is no rival. Of a forced expert, which need not be the largest, larger ones count as near.
    In training the model's authors sample the expert, and estimate the gradient of that by Heun's method; where the
    largest is what was sampled, their estimate is the derivative taken here.
    """
    weights, left = [], logits
    for expert in experts.split(1, 1):
        own = left.gather(1, expert)
        with torch.no_grad():
            far = (own - left) / logits.abs().maximum(own) > 2 * rule.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, expert))
        left = left.scatter(1, expert, -torch.inf)
    return torch.cat(weights, 1)
