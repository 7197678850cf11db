"""Routers that send tokens where they are told (R3: rollout routing replay, arXiv 2510.11370).

Which experts those are travels with the packed sequences through the layers' arguments, and each layer's computation
keeps them in its closure. So a layer that is computed again in backward finds those of its own micro-batch, although a
pipeline schedule has run others since. Import after prepare_megatron.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer

from qerl_rl.model.forced_experts import ForcedExperts


class RoutedSequences(PackedSeqParams):
    """Packed sequences, and the experts that their tokens are sent to (None: those that the routers choose)."""

    def __init__(self, forced: ForcedExperts | None, **sequences: Any) -> None:
        super().__init__(**sequences)
        self.forced = forced


class ReplayingLayer(TransformerLayer):
    """Megatron's layer; tells its experts what the packed sequences say of them."""

    def forward(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        self.mlp.forced = getattr(packed_seq_params, "forced", None)
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class ReplayingMoELayer(MoELayer):
    """Megatron's MoE layer with a `ReplayingRouter`."""

    forced: ForcedExperts | None = None
    moe_layer_recompute: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router = ReplayingRouter(config=self.config)
        # Megatron's own recomputation would ask the router for the micro-batch that came last.
        self._recomputes, self.moe_layer_recompute = self.moe_layer_recompute, False

    def forward(self, hidden_states: torch.Tensor) -> Any:
        forced, whole_layer = self.forced, super().forward

        def run(hidden_states: torch.Tensor) -> Any:
            self.router.forced = forced
            return whole_layer(hidden_states)

        return tensor_parallel.checkpoint(run, False, hidden_states) if self._recomputes else run(hidden_states)


class ReplayingRouter(TopKRouter):
    """Megatron's router, whose choice can be replaced; how much each expert counts is its own and differentiable."""

    forced: ForcedExperts | None = None

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: logits float32 [tokens, 1, experts] of this rank's part of the sequence.

        Returns: the experts' weights [tokens, experts], 0 for those not chosen, and which are chosen, bool.
        With m the mask of those chosen and s the logits, the weights are m exp(s) / sum(m exp(s)), as the paper has it,
        or m softmax(s) in a model that does not normalize them.
        """
        forced = self.forced
        if forced is None:
            return super().routing(logits)
        flat = logits.view(-1, self.num_experts)
        first = 0
        if self.config.sequence_parallel:
            first = parallel_state.get_tensor_model_parallel_rank() * len(flat)
        experts, known = forced.of(self.layer_number - 1, first, len(flat))
        own = flat.detach().topk(self.topk, dim=1).indices
        chosen = torch.where(known[:, None], experts, own)
        before = self.config.moe_router_pre_softmax
        weights = (flat.softmax(-1) if before else flat).gather(1, chosen)
        weights = weights if before else weights.softmax(-1)
        chosen_map = _mask(flat, chosen)
        changed = (chosen_map != _mask(flat, own)).any(1)
        forced.changed[self.layer_number - 1] = torch.stack([changed.sum(), known.sum()])
        return torch.zeros_like(flat).scatter(1, chosen, weights), chosen_map


def _mask(like: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.bool).scatter_(1, indices, value=True)
