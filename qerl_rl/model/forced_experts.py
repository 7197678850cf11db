"""The experts that a micro-batch's tokens are sent to, whatever the routers would choose; knows no Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class ForcedExperts:
    """Of one packed micro-batch of T tokens.

    experts: uint8 or int16 [T, layers, k], distinct for each token and layer, of all layers of the model. known: bool
    [T], which tokens have them; the others go where the routers send them. changed: by layer (counted from 0), int64
    [2]: how many of this rank's known tokens the router would have sent to other experts, and how many there are. A
    pass sets it, so that what is computed again in backward is not counted twice.
    """

    experts: torch.Tensor
    known: torch.Tensor
    changed: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, layer: int, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts int64 [tokens, k] and known bool [tokens] of a run of tokens in one layer."""
        run = slice(first, first + tokens)
        return self.experts[run, layer].long(), self.known[run]
