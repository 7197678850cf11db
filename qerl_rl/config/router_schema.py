"""The keys of the section train that say how its routers work (names as in Megatron and MindSpeed-LLM)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterConfig:
    router_load_balancing: str = "auto"
    """auto (as the model was made) or none, the same; aux_loss (the same, and a loss that keeps experts equally busy);
    or another rule than the model's: softmax_topk, sinkhorn, group_limited_greedy or sparsemixer_topk
    (docs/routing.md)."""
    router_aux_loss_coefficient: float = 0.0
    """What the loss of aux_loss is multiplied by before it joins the policy's; 0.01 is usual."""
    router_num_groups: int = 0
    """Groups of experts, in group_limited_greedy; 0 takes the model's."""
    router_group_topk: int = 0
    """Groups that a token's experts come from, in group_limited_greedy; 0 takes the model's."""
