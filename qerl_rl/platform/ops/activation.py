"""silu(gate) * up * probability: what an expert computes between its two matrices, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qerl_rl.platform import bfloat16_loops
from qerl_rl.platform.ops.checks import require
from qerl_rl.platform.ops.selection import fused


def weighted_swiglu(hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """[T, I] from hidden [T, 2I] (gate, then up), in its type; no gradient is recorded on an NPU (see `swiglu`).

    Args: probabilities [T] float32: as in Megatron's experts, they are applied before the second matrix.
    Raises: ValueError when the shapes do not fit.
    torch_npu: npu_swiglu(input, dim) ("npu_swiglu" in the API reference), which rounds before the probabilities; the
    reference computes in float32 and rounds once.
    """
    _check(hidden, probabilities)
    if fused("swiglu", hidden):
        activated = torch.ops.npu.npu_swiglu(hidden.detach(), -1)
        return (activated * probabilities.unsqueeze(-1)).to(hidden.dtype)
    if bfloat16_loops.has_loops(hidden):
        return bfloat16_loops.weighted_swiglu(hidden, probabilities.float())
    gate, up = hidden.chunk(2, -1)
    return F.silu(_exact(gate)).mul_(up).mul_(probabilities.unsqueeze(-1)).to(hidden.dtype)


def weighted_swiglu_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden [T, 2I] and of probabilities [T] from that of the output [T, I], and the output again.

    Returns: the first and the last in the type of hidden, the second in that of probabilities.
    torch_npu: npu_swiglu_backward(grad_output, input, dim), the kernel behind torch_npu's own gradient of npu_swiglu.
    """
    _check(hidden, probabilities)
    if fused("swiglu", hidden):
        weights = probabilities.unsqueeze(-1)
        weighted = (gradient * weights).to(hidden.dtype)
        grad_hidden = torch.ops.npu.npu_swiglu_backward(weighted, hidden, -1)
        activated = torch.ops.npu.npu_swiglu(hidden, -1)
        grad_probabilities = (gradient.to(probabilities.dtype) * activated).sum(-1)
        return grad_hidden, grad_probabilities, (activated * weights).to(hidden.dtype)
    if bfloat16_loops.has_loops(hidden):
        gradient = gradient.to(hidden.dtype)
        grad_hidden, exact, output = bfloat16_loops.weighted_swiglu_backward(gradient, hidden, probabilities.float())
        return grad_hidden, exact.to(probabilities.dtype), output
    gate, up = (_exact(part) for part in hidden.chunk(2, -1))
    grad_hidden, gradient = torch.empty_like(hidden), _exact(gradient)
    grad_gate, grad_up = grad_hidden.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    grad_probabilities = (gradient * activated).mul_(up).sum(-1)
    weighted = gradient * probabilities.unsqueeze(-1)
    grad_up.copy_(weighted * activated)
    # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
    slope = (1 - sigmoid).mul_(activated).add_(sigmoid)
    grad_gate.copy_(slope.mul_(weighted.mul_(up)))
    return grad_hidden, grad_probabilities, weighted_swiglu(hidden, probabilities)


def swiglu(hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """`weighted_swiglu` with gradients, keeping only its inputs: autograd's version keeps four tensors of this size."""
    return _WeightedSwiGlu.apply(hidden, probabilities)


class _WeightedSwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, probabilities)
        return weighted_swiglu(hidden, probabilities)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return weighted_swiglu_backward(gradient, *ctx.saved_tensors)[:2]


def _exact(part: torch.Tensor) -> torch.Tensor:
    return part if part.dtype == torch.float64 else part.float()


def _check(hidden: torch.Tensor, probabilities: torch.Tensor) -> None:
    fits = hidden.dim() == 2 and hidden.size(1) % 2 == 0 and probabilities.shape == hidden.shape[:1]
    require(
        fits and hidden.is_floating_point() and probabilities.device == hidden.device,
        "swiglu",
        "hidden [T, 2I] and probabilities [T] on one device",
        hidden=hidden,
        probabilities=probabilities,
    )
