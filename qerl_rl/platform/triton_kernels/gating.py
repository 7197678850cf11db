"""The router's choice in one launch: softmax over the experts, then the k most probable."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _gate(logits, values, chosen, experts, stride, k: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program a token, with all of its experts in registers."""
    token = tl.program_id(0)
    index = tl.arange(0, block)
    row = tl.load(logits + token * stride + index, mask=index < experts, other=float("-inf")).to(tl.float32)
    weights = tl.exp(row - tl.max(row, axis=0))
    left = weights / tl.sum(weights, axis=0)
    # What is taken, and what only fills the block, is less than any probability.
    left = tl.where(index < experts, left, -1.0)
    for place in tl.static_range(k):
        largest = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == largest, index, block), axis=0)
        tl.store(values + token * k + place, largest)
        tl.store(chosen + token * k + place, expert)
        left = tl.where(index == expert, -1.0, left)


def gating_top_k_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass of `platform.ops.gating_top_k_softmax`; of equal probabilities the first comes first."""
    tokens, experts = logits.shape
    values = torch.empty(tokens, k, dtype=logits.dtype, device=logits.device)
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    if tokens:
        flat = logits.contiguous()
        _gate[(tokens,)](flat, values, chosen, experts, flat.stride(0), k=k, block=triton.next_power_of_2(experts))
    return values, chosen
