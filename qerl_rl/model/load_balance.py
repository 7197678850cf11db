"""The loss that keeps experts equally busy (Switch Transformer, arXiv 2101.03961, eq. 4).

It joins the gradient of the policy's loss in the router that it is taken of, so that neither pipeline stages nor
recomputation know of it. Import after prepare_megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from qerl_rl.layout.routing import SIGMOID, RoutingRule
from qerl_rl.model.routers import scores


@dataclass(frozen=True)
class LoadBalance:
    """The balancing loss of one micro-batch.

    coefficient: train.router_aux_loss_coefficient. weight: the micro-batch's part of what the policy's loss is divided
    by; so the balancing loss is a mean in which each micro-batch counts like in the policy's loss. tokens: of the
    packed sequences, without the padding at their end. losses: by layer (counted from 0), this rank's part of a loss
    that is 1 where the experts are equally busy. A pass sets it, so that what is computed again in backward is not
    counted twice.
    """

    coefficient: float
    weight: int
    tokens: int
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

        With p the scores of a token, k its experts, and c the number of tokens that each expert has, the loss is
        E sum_e(c_e sum_t p_te) / (k tokens^2).

        Args: logits float32 [T, E]; chosen bool [T, E]; whole_sequence: whether tensor-parallel ranks have the same T
            tokens (alltoall_seq) and not a part each.
        """
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        first = 0 if whole_sequence else parallel_state.get_tensor_model_parallel_rank() * len(logits)
        real = min(max(self.tokens - first, 0), len(logits))
        shares = scores(rule, logits[:real])
        if rule.scores == SIGMOID:
            shares = shares / shares.sum(-1, keepdim=True)
        counts = chosen[:real].sum(0)
        if ranks > 1 and not whole_sequence:
            dist.all_reduce(counts, group=parallel_state.get_tensor_model_parallel_group())
        loss = (counts * shares.sum(0)).sum() * logits.size(1) / (rule.top_k * max(self.tokens, 1) ** 2)
        # Gradients of what all ranks computed alike are summed.
        loss = loss / ranks if whole_sequence else loss
        self.losses[layer] = loss.detach()
        return MoEAuxLossAutoScaler.apply(weights, loss * self.coefficient * self.weight)
