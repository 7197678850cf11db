"""Slots of multi-head latent attention, by the names of Megatron-core's MLASelfAttention."""

from __future__ import annotations

import math

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import Block
from qerl_rl.layout.parts import LatentAttention
from qerl_rl.layout.slot import Piece, Slot

_NAME, _HF = "self_attention.", "model.layers.{}.self_attn."


def latent_attention_slots(architecture: MoeArchitecture, latent: LatentAttention, layer: int) -> list[Slot]:
    """All weights between a layer's two norms.

    The up projections are [heads, rows of a head, columns]: heads are what is split. The down projections are column
    parallel, as in Megatron 0.12.1, whose outputs it gathers.
    """
    heads, hidden, prefix = architecture.attention_heads, architecture.hidden_size, _HF.format(layer)
    key_value = latent.nope_head_dim + latent.value_head_dim

    def linear(leaf: str, hf_leaf: str, shape: tuple[int, ...], split_dim: int = 0) -> Slot:
        piece = Piece(f"{prefix}{hf_leaf}.weight", (math.prod(shape[:-1]), shape[-1]))
        return Slot(layer, f"{_NAME}{leaf}.weight", Block(shape, split_dim), (piece,), quantizable=True)

    def norm(leaf: str, hf_leaf: str, width: int) -> Slot:
        return Slot(layer, f"{_NAME}{leaf}.weight", Block((width,)), (Piece(f"{prefix}{hf_leaf}.weight", (width,)),))

    if latent.query_rank is None:
        queries = [linear("linear_q_proj", "q_proj", (heads, architecture.head_dim, hidden))]
    else:
        queries = [
            linear("linear_q_down_proj", "q_a_proj", (latent.query_rank, hidden)),
            norm("q_layernorm", "q_a_layernorm", latent.query_rank),
            linear("linear_q_up_proj", "q_b_proj", (heads, architecture.head_dim, latent.query_rank)),
        ]
    return [
        *queries,
        linear("linear_kv_down_proj", "kv_a_proj_with_mqa", (latent.key_value_rank + latent.rope_head_dim, hidden)),
        norm("kv_layernorm", "kv_a_layernorm", latent.key_value_rank),
        linear("linear_kv_up_proj", "kv_b_proj", (heads, key_value, latent.key_value_rank)),
        linear("linear_proj", "o_proj", (hidden, architecture.attention_output_size), 1),
    ]


def latent_attention_adapters(
    architecture: MoeArchitecture, latent: LatentAttention, layer: int, rank: int
) -> list[Slot]:
    """Adapters of every projection but kv_b_proj.

    Engines multiply kv_b_proj into queries and outputs when they load it and never call it in decoding: an adapter
    beside it would change prompts and not answers.
    """
    prefix = _HF.format(layer)

    def column(leaf: str, hf_leaf: str, outputs: int, inputs: int) -> list[Slot]:
        a, b = Piece(f"{prefix}{hf_leaf}.lora_A", (rank, inputs)), Piece(f"{prefix}{hf_leaf}.lora_B", (outputs, rank))
        name = f"{_NAME}{leaf}.weight_lora_"
        return [Slot(layer, f"{name}A", Block(a.shape), (a,)), Slot(layer, f"{name}B", Block(b.shape, 0), (b,))]

    hidden, query_rank = architecture.hidden_size, latent.query_rank
    if query_rank is None:
        slots = column("linear_q_proj", "q_proj", architecture.query_size, hidden)
    else:
        slots = column("linear_q_down_proj", "q_a_proj", query_rank, hidden)
        slots += column("linear_q_up_proj", "q_b_proj", architecture.query_size, query_rank)
    compressed = latent.key_value_rank + latent.rope_head_dim
    return slots + column("linear_kv_down_proj", "kv_a_proj_with_mqa", compressed, hidden)
