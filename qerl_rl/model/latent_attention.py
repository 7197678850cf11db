"""Multi-head latent attention over packed sequences (DeepSeek-V2, arXiv 2405.04434). Import after prepare_megatron.

Megatron's MLASelfAttention holds the projections and the output; what it makes of packed sequences is replaced, since
in 0.12.1 it
- turns queries and keys of [tokens, 1, heads, width] by angles that broadcast over heads and not over tokens,
- gives the part of the keys that all heads share the gradient of this tensor-parallel rank's heads alone,
- scales the attention by `mscale`, where config.json means `mscale_all_dim` (they are equal in published models).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from qerl_rl.layout.parts import LatentAttention, Yarn
from qerl_rl.platform.ops import rotary


class PackedLatentAttention(MLASelfAttention):
    """Megatron's layer with rotary positions that start anew in each packed sequence."""

    def __init__(
        self, config: MLATransformerConfig, *args: Any, latent: LatentAttention, yarn: Yarn | None, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self._latent = latent
        self.rotary_pos_emb = None
        self._angles = RotaryAngles(config.rotary_base, latent.rope_head_dim, yarn)
        if yarn is not None:
            self.core_attention.scale = self.q_head_dim**-0.5 * yarn.product_scale

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: None = None,
        position_ids: None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: None = None,
        **ignored: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [tokens, heads, nope + rope] and values [tokens, heads, value width] of this rank's heads.

        Args: hidden_states [tokens (of this rank if sequence parallel), 1, hidden] of packed sequences.
        """
        if packed_seq_params is None:
            raise ValueError("latent attention takes packed sequences only")
        latent = self._latent
        if latent.query_rank is None:
            queries, _ = self.linear_q_proj(hidden_states)
        else:
            compressed = self._whole(self.linear_q_down_proj(hidden_states)[0])
            queries, _ = self.linear_q_up_proj(self.q_layernorm(self._own_tokens(compressed)))
        combined = self._whole(self.linear_kv_down_proj(hidden_states)[0])
        compressed, shared_key = combined.split([latent.key_value_rank, latent.rope_head_dim], dim=-1)
        keys_values, _ = self.linear_kv_up_proj(self.kv_layernorm(self._own_tokens(compressed)))
        # Each rank computes the gradient through its own heads.
        shared_key = copy_to_tensor_model_parallel_region(shared_key)

        heads = self.num_attention_heads_per_partition
        queries, keys_values = (x.squeeze(1).unflatten(-1, (heads, -1)) for x in (queries, keys_values))
        plain_query, turned_query = queries.split([latent.nope_head_dim, latent.rope_head_dim], dim=-1)
        plain_key, value = keys_values.split([latent.nope_head_dim, latent.value_head_dim], dim=-1)
        cos, sin = self._angles(positions(packed_seq_params.cu_seqlens_q), queries.dtype)
        turned_query = self._turn(turned_query, cos, sin)
        turned_key = self._turn(shared_key, cos, sin).expand(-1, heads, -1)
        return torch.cat([plain_query, turned_query], -1), torch.cat([plain_key, turned_key], -1), value

    def _whole(self, columns: torch.Tensor) -> torch.Tensor:
        """All columns of a down projection, of which every tensor-parallel rank has computed its share."""
        return gather_from_tensor_model_parallel_region(columns)

    def _own_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """What a norm and an up projection take: this rank's part of the sequence, which they gather again."""
        return scatter_to_sequence_parallel_region(x) if self.config.sequence_parallel else x

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [tokens, heads, width], its elements in the order of halves afterwards (of queries and keys alike)."""
        if self._latent.interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
        return rotary(x.unsqueeze(1), cos, sin).squeeze(1)


class RotaryAngles:
    """Cosine and sine of each position, [tokens, 1, 1, width] in the order of halves, computed in float32."""

    def __init__(self, theta: float, width: int, yarn: Yarn | None) -> None:
        if yarn is None:
            self._frequencies = theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        else:
            self._frequencies = yarn.frequencies(theta, width)
        self._factor = yarn.attention_factor if yarn else 1.0

    def __call__(self, position: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position: int64 [tokens]."""
        angles = position[:, None].float() * self._frequencies.to(position.device)
        angles = torch.cat([angles, angles], -1)[:, None, None]
        return (angles.cos() * self._factor).to(dtype), (angles.sin() * self._factor).to(dtype)


def positions(starts: torch.Tensor) -> torch.Tensor:
    """Of packed tokens, each in its own sequence: int64 [tokens]. starts: int32 [sequences + 1]."""
    starts = starts.long()
    return torch.arange(int(starts[-1]), device=starts.device) - starts[:-1].repeat_interleave(starts.diff())
