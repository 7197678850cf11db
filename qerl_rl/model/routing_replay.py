"""Megatron's layers with routers that follow a `RoutingRule`, or send tokens where they are told.

The latter is R3 (rollout routing replay, arXiv 2510.11370). Which experts those are travels with the packed sequences
through the layers' arguments, and each layer's computation keeps them in its closure. So a layer that is computed again
in backward finds those of its own micro-batch, although a pipeline schedule has run others since. Import after
prepare_megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from qerl_rl.layout.routing import SIGMOID, RoutingRule
from qerl_rl.model.dispatchers import DISPATCHERS
from qerl_rl.model.forced_experts import ForcedExperts
from qerl_rl.model.load_balance import LoadBalance
from qerl_rl.model.routers import choose, weigh


class RoutedSequences(PackedSeqParams):
    """Packed sequences, the experts that their tokens are sent to (None: those that the routers choose), and the loss
    that balances the experts (None: there is none)."""

    def __init__(self, forced: ForcedExperts | None, balance: LoadBalance | None = None, **sequences: Any) -> None:
        super().__init__(**sequences)
        self.forced, self.balance = forced, balance


class ReplayingLayer(TransformerLayer):
    """Megatron's layer; tells its experts what the packed sequences say of them."""

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        self.mlp.forced = getattr(packed_seq_params, "forced", None)
        self.mlp.balance = getattr(packed_seq_params, "balance", None)
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class ReplayingMoELayer(MoELayer):
    """Megatron's MoE layer with a `ReplayingRouter`."""

    forced: ForcedExperts | None = None
    balance: LoadBalance | None = None
    moe_layer_recompute: bool

    def __init__(self, *args: Any, rule: RoutingRule, dispatcher: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # That dispatcher deals out all tokens of the tensor-parallel ranks, a part of their columns on each.
        self.router = ReplayingRouter(self.config, rule, whole_sequence=dispatcher == "alltoall_seq")
        self.token_dispatcher = DISPATCHERS[dispatcher](self.num_local_experts, self.local_expert_indices, self.config)
        # Megatron's own recomputation would ask the router for the micro-batch that came last.
        self._recomputes, self.moe_layer_recompute = self.moe_layer_recompute, False

    def forward(self, hidden_states: torch.Tensor) -> Any:
        forced, balance, whole_layer = self.forced, self.balance, super().forward

        def run(hidden_states: torch.Tensor) -> Any:
            self.router.forced, self.router.balance = forced, balance
            return whole_layer(hidden_states)

        return tensor_parallel.checkpoint(run, False, hidden_states) if self._recomputes else run(hidden_states)


class ReplayingRouter(TopKRouter):
    """Megatron's router with another rule; its choice can be replaced, how much each expert counts is its own."""

    forced: ForcedExperts | None = None
    balance: LoadBalance | None = None

    def __init__(self, config: TransformerConfig, rule: RoutingRule, *, whole_sequence: bool) -> None:
        super().__init__(config)
        self.rule, self._whole_sequence = rule, whole_sequence
        if rule.has_bias:
            # Megatron's own switch would also make its training step change the bias, by how many tokens came.
            del self.expert_bias
            self.register_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: logits float32 [tokens, 1, experts] of this rank's part of the sequence.

        Returns: the experts' weights [tokens, experts], 0 for those not chosen, and which are chosen, bool.
        With m the mask of those chosen and s the logits, the weights of a model that normalizes them are m exp(s) /
        sum(m exp(s)), as the paper has it; `RoutingRule` says what others are.
        """
        flat = logits.view(-1, self.num_experts)
        if self._whole_sequence:
            flat = gather_from_sequence_parallel_region(flat)
        # A bias is one of sigmoid scores: another rule than the model's own has none.
        bias = self.expert_bias if self.rule.scores == SIGMOID else None
        chosen = choose(self.rule, flat.detach(), training=self.training, bias=bias)
        if self.forced is not None:
            chosen = self._replaced(chosen, self.forced)
        weights = torch.zeros_like(flat).scatter(1, chosen, weigh(self.rule, flat, chosen))
        chosen_map = self._mask(chosen)
        if self.balance is not None and torch.is_grad_enabled():
            layer, whole = self.layer_number - 1, self._whole_sequence
            weights = self.balance.attach(weights, self.rule, flat, chosen_map, layer=layer, whole_sequence=whole)
        return weights, chosen_map

    def _replaced(self, own: torch.Tensor, forced: ForcedExperts) -> torch.Tensor:
        """The experts [tokens, k] that tokens are sent to; counts those that `own` would have sent elsewhere."""
        first = 0
        if self.config.sequence_parallel and not self._whole_sequence:
            first = parallel_state.get_tensor_model_parallel_rank() * len(own)
        experts, known = forced.of(self.layer_number - 1, first, len(own))
        chosen = torch.where(known[:, None], experts, own)
        changed = (self._mask(chosen) != self._mask(own)).any(1)
        forced.changed[self.layer_number - 1] = torch.stack([changed.sum(), known.sum()])
        return chosen

    def _mask(self, experts: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(len(experts), self.num_experts, dtype=torch.bool, device=experts.device)
        return mask.scatter_(1, experts, value=True)
