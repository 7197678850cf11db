"""Token dispatchers: how tokens reach the ranks of their experts. Import after prepare_megatron."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.legacy_a2a_token_dispatcher import MoEAlltoAllSEQTokenDispatcher
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)


class AllGatherDispatcher(MoEAllGatherTokenDispatcher):
    """Megatron's, for ranks that have different numbers of tokens.

    It gathers equal parts from all ranks that share the experts, and packed micro-batches of data-parallel ranks differ
    in length. Rows that no expert gets fill the shorter ones.
    """

    def token_permutation(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Args: hidden_states [T, batch, H]; probs [T * batch, experts]; routing_map bool [T * batch, experts]."""
        self._own_shape = hidden_states.shape
        flat = hidden_states.reshape(-1, hidden_states.size(-1))
        missing = self._longest(flat) - len(flat)
        if missing:
            flat, probs, routing_map = (F.pad(part, (0, 0, 0, missing)) for part in (flat, probs, routing_map))
        return super().token_permutation(flat, probs, routing_map)

    def token_unpermutation(
        self, hidden_states: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Any]:
        output, bias = super().token_unpermutation(hidden_states, bias)
        return output[: self._own_shape.numel() // self._own_shape[-1]].view(self._own_shape), bias

    def _longest(self, tokens: torch.Tensor) -> int:
        if self.tp_size * self.ep_size == 1:
            return len(tokens)
        longest = torch.tensor([len(tokens)], device=tokens.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
        return int(longest)


DISPATCHERS: dict[str, type[MoETokenDispatcher]] = {
    "alltoall": MoEAlltoAllTokenDispatcher,
    "allgather": AllGatherDispatcher,
    "alltoall_seq": MoEAlltoAllSEQTokenDispatcher,
}
"""By train.token_dispatcher."""
