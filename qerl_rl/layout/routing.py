"""How a model's routers choose experts and weigh them, and what train.router_load_balancing makes of that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig

TOP_K, GROUP_LIMITED, SPARSE_MIXER, SINKHORN = "top_k", "group_limited", "sparse_mixer", "sinkhorn"
SOFTMAX, SIGMOID = "softmax", "sigmoid"
SPARSE_MIXER_JITTER = 0.01
"""What Phi-3.5-MoE was trained with, for models that name none."""


@dataclass(frozen=True)
class RoutingRule:
    """Which experts a token goes to, and how much each counts, given the logits s of all experts.

    choice: `top_k` takes the largest scores; `group_limited` the largest in the best groups (DeepSeek-V2 and V3);
    `sparse_mixer` the largest, then the largest of the others, each weighed against its near rivals only (Phi-3.5-MoE);
    `sinkhorn` those of an assignment that is balanced over the tokens of a micro-batch (S-BASE).
    """

    top_k: int
    choice: str = TOP_K
    scores: str = SOFTMAX
    """softmax or sigmoid of s: what the weights are, of the experts chosen."""
    normalized: bool = True
    """Weights of the chosen experts sum to 1 (before scaling)."""
    scaling: float = 1.0
    """What the weights are multiplied by."""
    groups: int = 1
    """Groups of neighbouring experts, of equal size."""
    chosen_groups: int = 1
    """Groups that a token's experts may come from: those that score best."""
    best_of_group: int = 1
    """A group's score is the sum of its so many largest: 1 in DeepSeek-V2, 2 in V3."""
    has_bias: bool = False
    """Each expert has a number of its own, which counts in the choice and not in the weight (DeepSeek-V3)."""
    jitter: float = SPARSE_MIXER_JITTER
    """Of sparse_mixer: a rival is near when it lies within 2 * jitter of the chosen logit, relatively."""


def chosen_rule(own: RoutingRule, experts: int, train: TrainConfig) -> RoutingRule:
    """The rule that the trainer computes: the model's own, or the one that train.router_load_balancing names.

    Args: own: of the model. experts: of a layer.
    Raises: ConfigError when the model has not what that rule needs.
    """
    kind = train.router_load_balancing
    if kind in ("auto", "none", "aux_loss"):
        return own
    if kind == "softmax_topk":
        return replace(own, choice=TOP_K, scores=SOFTMAX)
    if kind == "sinkhorn":
        return replace(own, choice=SINKHORN, scores=SOFTMAX)
    if kind == "sparsemixer_topk":
        return _sparse_mixer(own)
    return _group_limited(own, experts, train)


def _sparse_mixer(own: RoutingRule) -> RoutingRule:
    if own.top_k != 2:
        raise ConfigError(
            f"train.router_load_balancing=sparsemixer_topk chooses 2 experts a token, and the model has {own.top_k}.",
            fix="set train.router_load_balancing to auto",
        )
    return replace(own, choice=SPARSE_MIXER)


def _group_limited(own: RoutingRule, experts: int, train: TrainConfig) -> RoutingRule:
    groups = train.router_num_groups or own.groups
    chosen = train.router_group_topk or own.chosen_groups
    if groups < 2:
        raise ConfigError(
            "train.router_load_balancing=group_limited_greedy, but neither the model nor train.router_num_groups has"
            " groups of experts.",
            fix=f"set train.router_num_groups to a divisor of the model's {experts} experts, and router_group_topk",
        )
    if experts % groups:
        fitting = [size for size in range(2, experts + 1) if experts % size == 0]
        raise ConfigError(
            f"train.router_num_groups={groups} does not divide the model's {experts} experts.",
            fix=f"set train.router_num_groups to {' or '.join(map(str, fitting))}",
        )
    if chosen > groups or chosen * (experts // groups) < own.top_k:
        fewest = -(-own.top_k // (experts // groups))
        raise ConfigError(
            f"train.router_group_topk={chosen} of {groups} groups of {experts // groups} experts leave no choice of"
            f" {own.top_k} experts.",
            fix=f"set train.router_group_topk to {fewest} or more, up to {groups}",
        )
    return replace(own, choice=GROUP_LIMITED, scores=SOFTMAX, groups=groups, chosen_groups=chosen, best_of_group=1)
