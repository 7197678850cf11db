"""The router's choice: softmax over the experts, then the k most probable."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qerl_rl.platform.ops.checks import on_npu, require, require_floats

MOST_CHOSEN = 1024


def gating_top_k_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of softmax(logits), not normalized again, and whose they are.

    Args: logits [T, E] float; k between 1 and E.
    Returns: [T, k] in the type of logits, in falling order, and int32 [T, k]. A gradient reaches logits.
    Raises: ValueError for another shape or k.
    torch_npu: npu_moe_gating_top_k_softmax(x, finished, k) -> (y, expert_idx, row_idx)
    ("npu_moe_gating_top_k_softmax" in the API reference), which has no gradient of its own.
    """
    require_floats("gating_top_k_softmax", logits=logits)
    fits = logits.dim() == 2 and 1 <= k <= min(logits.shape[1], MOST_CHOSEN)
    require(fits, "gating_top_k_softmax", "logits [T, E] and 1 <= k <= E", logits=logits, k=k)
    return _GatingTopKSoftmax.apply(logits, k)


class _GatingTopKSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if on_npu(logits) and len(logits):
            chosen, experts, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits, None, k)
        elif logits.device.type == "cuda":
            from qerl_rl.platform.triton_kernels import gating

            chosen, experts = gating.gating_top_k_softmax(logits, k)
        else:
            largest, experts = _softmax(logits).topk(k, -1)
            chosen, experts = largest.to(logits.dtype), experts.int()
        ctx.save_for_backward(logits, experts)
        ctx.mark_non_differentiable(experts)
        return chosen, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor, None]:
        logits, experts = ctx.saved_tensors
        probabilities = _softmax(logits)
        of_all = torch.zeros_like(probabilities).scatter_(-1, experts.long(), gradient.to(probabilities.dtype))
        # d p_i / d x_j = p_i (1[i = j] - p_j)
        weighted = of_all * probabilities
        return (weighted - probabilities * weighted.sum(-1, keepdim=True)).to(logits.dtype), None


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return torch.softmax(logits, -1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
