"""Linear layers over tensor-parallel ranks, with a quantized or frozen base and an optional LoRA adapter.

They take the place of Megatron's ColumnParallelLinear and RowParallelLinear in the layer spec. The attention weights of
a quantized checkpoint stay as stored and are dequantized in forward and in backward, by the same function as the
experts: it costs no code of its own and keeps the trainer's base on the engine's grid without a float copy.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from qerl_rl.model.adapted import AdaptedModule, LayerWeights
from qerl_rl.model.base_weight import Base
from qerl_rl.model.grouped_linear import Adapter, grouped_linear


class _AdaptedLinear(AdaptedModule):
    """Base weight `weight` [N, K] of this rank, adapter `weight_lora_A` [r, K] and `weight_lora_B` [N, r]."""

    def __init__(self, inputs: int, outputs: int, config: TransformerConfig, weights: LayerWeights) -> None:
        super().__init__(config, weights)
        self.add_weight("weight", (outputs, inputs))
        if self.lora is not None:
            self.add_adapter("weight", (self.lora.rank, inputs), (outputs, self.lora.rank))

    def _multiply(self, x: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
        own = self.base("weight")
        base = Base(tuple(tensor.unsqueeze(0) for tensor in own.tensors), own.format)
        flat = x.reshape(-1, x.size(-1))
        return grouped_linear(flat, base, adapter, [flat.size(0)]).view(*x.shape[:-1], base.outputs)


class ColumnLinear(_AdaptedLinear):
    """y = x W^T with the rows of W, and of the adapter's B, split over the tensor-parallel ranks.

    Every rank holds all of A and sees a part of its gradient, which the copy operator sums.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        weights: LayerWeights,
        skip_bias_add: bool = False,
        **ignored: Any,
    ) -> None:
        outputs = output_size // get_tensor_model_parallel_world_size()
        super().__init__(input_size, outputs, config, weights)
        self.skip_bias_add = skip_bias_add
        self.bias = Parameter(torch.zeros(outputs, dtype=config.params_dtype)) if bias else None
        for parameter in (self.bias, getattr(self, "weight_lora_B", None)):
            if parameter is not None:
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [sequence (of this rank if sequence parallel), batch, K] -> ([sequence, batch, N], bias to add)."""
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x)
        else:
            x = copy_to_tensor_model_parallel_region(x)
        adapter = None
        if self.adapters_enabled:
            a = copy_to_tensor_model_parallel_region(self.weight_lora_A)
            adapter = Adapter(a.unsqueeze(0), self.weight_lora_B.unsqueeze(0), self.scaling)
        y = self._multiply(x, adapter)
        if self.bias is None or self.skip_bias_add:
            return y, self.bias
        return y + self.bias, None


class RowLinear(_AdaptedLinear):
    """y = x W^T (+ b) with the columns of W, and of the adapter's A, split over the tensor-parallel ranks.

    own_bias: whether there is b, `bias` [N], which every rank holds (Megatron allows none beside experts). Every rank
    holds all of B as well and multiplies its part of the sum by it; the copy operator sums B's gradient.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        weights: LayerWeights,
        own_bias: bool = False,
        **ignored: Any,
    ) -> None:
        if bias:
            raise ValueError("a row-parallel layer takes own_bias, and not Megatron's bias")
        super().__init__(input_size // get_tensor_model_parallel_world_size(), output_size, config, weights)
        self.bias = Parameter(torch.zeros(output_size, dtype=config.params_dtype)) if own_bias else None
        if self.bias is not None:
            self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        for parameter in (getattr(self, "weight", None), getattr(self, "weight_lora_A", None)):
            if parameter is not None:
                parameter.tensor_model_parallel = True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [sequence, batch, K of this rank] -> ([sequence (of this rank if sequence parallel), batch, N], b)."""
        adapter = None
        if self.adapters_enabled:
            b = copy_to_tensor_model_parallel_region(self.weight_lora_B)
            adapter = Adapter(self.weight_lora_A.unsqueeze(0), b.unsqueeze(0), self.scaling)
        y = self._multiply(x, adapter)
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y), self.bias
        return reduce_from_tensor_model_parallel_region(y), self.bias
