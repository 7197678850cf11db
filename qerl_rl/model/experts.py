"""All experts of a rank in one module, stored as the rollout engine stores them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from qerl_rl.model.adapted import AdaptedModule, LayerWeights
from qerl_rl.model.expert_mlp import expert_mlp
from qerl_rl.model.grouped_linear import Adapter, grouped_linear
from qerl_rl.platform.ops import swiglu


class StackedExperts(AdaptedModule):
    """The experts of Megatron's MoE layer (in place of SequentialMLP, through the layer spec).

    w13 [E, 2I, H] (rows gate, then up) and w2 [E, H, I], with E experts and I intermediate columns of this rank, and
    the adapters w13_lora_A [E, r, H], w13_lora_B [E, 2I, r], w2_lora_A [E, r, I], w2_lora_B [E, H, r].
    """

    def __init__(self, experts: int, config: TransformerConfig, weights: LayerWeights) -> None:
        super().__init__(config, weights)
        self.split = parallel_state.get_expert_tensor_parallel_world_size()
        hidden, width = config.hidden_size, config.moe_ffn_hidden_size // self.split
        self.add_weight("w13", (experts, 2 * width, hidden))
        self.add_weight("w2", (experts, hidden, width))
        if self.lora is not None:
            rank = self.lora.rank
            self.add_adapter("w13", (experts, rank, hidden), (experts, 2 * width, rank))
            self.add_adapter("w2", (experts, rank, width), (experts, hidden, rank))
        self._describe_to_megatron()

    def _describe_to_megatron(self) -> None:
        """Say over which ranks gradients are summed, and which of several equal parameters counts in the norm."""
        # Experts' gradients are summed over the expert-data-parallel ranks, where those are not the data-parallel ones.
        own_group = self.config.expert_model_parallel_size > 1 or self.split != self.config.tensor_model_parallel_size
        for name, parameter in self.named_parameters():
            parameter.allreduce = not own_group  # type: ignore[attr-defined]
            replicated = name in ("w13_lora_A", "w2_lora_B") and self.split > 1
            parameter.tensor_model_parallel = not replicated  # type: ignore[attr-defined]

    def forward(
        self, tokens: torch.Tensor, tokens_per_expert: torch.Tensor, probabilities: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """One expert's tokens after the other's.

        Args: tokens [T, H], T may be zero; tokens_per_expert [E] int; probabilities [T] of the router.
        Returns: ([T, H], no bias); under expert tensor parallelism this rank's part of the sum.
        """
        rows = tokens_per_expert.tolist()
        bases = self.base("w13"), self.base("w2")
        adapters = self._adapter("w13", "A"), self._adapter("w2", "B")
        if not any(base.tensors[0].requires_grad for base in bases):
            return expert_mlp(tokens, probabilities, rows, bases, adapters), None
        hidden = grouped_linear(tokens, bases[0], adapters[0], rows)
        return grouped_linear(swiglu(hidden, probabilities), bases[1], adapters[1], rows), None

    def _adapter(self, name: str, replicated: str) -> Adapter | None:
        """The adapter of a weight; the matrix that all expert-tensor-parallel ranks hold gets its gradient summed."""
        if not self.adapters_enabled:
            return None
        matrices = {matrix: getattr(self, f"{name}_lora_{matrix}") for matrix in "AB"}
        if self.split > 1:
            matrices[replicated] = _SumGradient.apply(matrices[replicated])
        return Adapter(matrices["A"], matrices["B"], self.scaling)


class _SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the expert-tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=parallel_state.get_expert_tensor_parallel_group())
        return gradient
