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
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, -1)
    weights = probabilities.unsqueeze(-1)
    activated = F.silu(gate)
    product, gradient = activated * up, gradient.float()
    grad_probabilities = (gradient * product).sum(-1)
    weighted = gradient * weights
    grad_up.copy_(activated.mul_(weighted))
    grad_gate.copy_(torch.ops.aten.silu_backward(weighted.mul_(up), gate))
    return grad_hidden, grad_probabilities, product.mul_(weights).to(hidden.dtype)
