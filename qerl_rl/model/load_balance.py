"""The loss that keeps experts equally busy (Switch Transformer, arXiv 2101.03961, eq. 4).

It joins the gradient of the policy's loss in the router that it is taken of, so that neither pipeline stages nor
recomputation know of it. Import after prepare_megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, switch_load_balancing_loss_func

from qerl_rl.layout.routing import SIGMOID, RoutingRule
from qerl_rl.model.routers import scores


@dataclass(frozen=True)
class LoadBalance:
    """The balancing loss of one micro-batch.

    coefficient: train.router_aux_loss_coefficient. weight: the micro-batch's part of what the policy's loss is divided
    by; so the balancing loss is a mean in which each micro-batch counts like in the policy's loss.
    losses: by layer (counted from 0), this rank's part of a loss that is 1 where the experts are equally busy. A pass
    sets it, so that what is computed again in backward is not counted twice.
    """

    coefficient: float
    weight: int
    losses: dict[int, torch.Tensor] = field(default_factory=dict)

    def attach(
        self,
        weights: torch.Tensor,
        rule: RoutingRule,
        logits: torch.Tensor,
        chosen: torch.Tensor,
        *,
        layer: int,
        whole_sequence: bool,
    ) -> torch.Tensor:
        """`weights` [T, E], whose backward adds this loss's gradient to the logits.

        Args: logits float32 [T, E]; chosen bool [T, E]; whole_sequence: whether tensor-parallel ranks have the same T
            tokens (alltoall_seq) and not a part each.
        """
        shares = scores(rule, logits)
        if rule.scores == SIGMOID:
            shares = shares / shares.sum(-1, keepdim=True)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        group = None if whole_sequence or ranks == 1 else parallel_state.get_tensor_model_parallel_group()
        loss = switch_load_balancing_loss_func(
            probs=shares,
            tokens_per_expert=chosen.sum(0),
            topk=rule.top_k,
            moe_aux_loss_coeff=1.0 / ranks if whole_sequence else 1.0,
            sequence_partition_group=group,
        )
        self.losses[layer] = loss.detach()
        return MoEAuxLossAutoScaler.apply(weights, loss * self.coefficient * self.weight)
