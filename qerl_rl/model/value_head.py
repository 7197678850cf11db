"""The output layer of a value model: one number a token in place of the vocabulary's logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter


class ValueHead(torch.nn.Module):
    """value = hidden w^T, without bias, in float32 whatever the model's type; values are 0 until `load_hf` fills w.

    Every tensor-parallel rank holds all of `weight` [1, hidden] and computes all values. So each has the whole gradient
    already, and what comes back through the gathered sequence is cut up again instead of summed.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = Parameter(torch.zeros(1, config.hidden_size, dtype=torch.float32))

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """The sequence parts [sequence / tensor_parallel, batch, hidden] of all tensor-parallel ranks, put together."""
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

    def forward(self, hidden: torch.Tensor, **ignored: Any) -> tuple[torch.Tensor, None]:
        """hidden [sequence (of this rank if sequence parallel), batch, hidden] -> ([sequence, batch, 1], no bias)."""
        if self.sequence_parallel:
            hidden = self.gather(hidden)
        return torch.nn.functional.linear(hidden.float(), self.weight), None
