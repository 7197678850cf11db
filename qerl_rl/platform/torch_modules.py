"""Layer modules in plain torch: RMSNorm under sequence parallelism, attention over packed sequences.

Megatron's own modules do both only with Transformer Engine. These run on every device and enter through the layer spec,
not by patching. Import after `prepare_megatron`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from qerl_rl.platform.ops import packed_attention, rms_norm


class RMSNorm(torch.nn.Module):
    """y = x / rms(x) * weight over the last dimension, rms in float32.

    The weight is tagged `sequence_parallel`, by which Megatron sums its gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's, with parameters that are tagged as those of `RMSNorm` are."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):
    """Causal attention with grouped key and value heads: a fused kernel where the device has one for packed sequences.

    Takes [sequence, batch, heads, head_dim], or [tokens, heads, head_dim] of packed sequences (thd), of which each
    attends to itself only.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **ignored: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """[sequence, batch, heads * head_dim], or [tokens, heads * head_dim] of packed sequences.

        attention_mask (unpacked only) is True where a key must not be seen; without one the attention is causal.
        """
        if packed_seq_params is None:
            mask = None if attention_mask is None else ~attention_mask
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            grouped = q.size(1) != k.size(1)
            output = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            return output.permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        return packed_attention(query, key, value, lengths, self.scale).flatten(1)
