"""silu(gate) * up * probability: what an expert computes between its two matrices, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def weighted_swiglu(hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """[T, I] from hidden [T, 2I] (gate, then up), in its type; computed in float32 and rounded once.

    Args: probabilities [T] float32: as in Megatron's experts, they are applied before the second matrix.
    """
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate.float()).mul_(up).mul_(probabilities.unsqueeze(-1)).to(hidden.dtype)


def weighted_swiglu_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden [T, 2I] and of probabilities [T] from that of the output [T, I], and the output again.

    Returns: the first and the last in the type of hidden, the second float32.
    """
    gate, up = (part.float() for part in hidden.chunk(2, -1))
    grad_hidden, gradient = torch.empty_like(hidden), gradient.float()
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
