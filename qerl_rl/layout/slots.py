"""Where each HF tensor, and each adapter of the exchange format, lies in the Megatron model.

A slot is one Megatron tensor: its block (how the full tensor is split over ranks) and its pieces (which named tensors
it consists of). Loading, export and the adapter exchange all read this one table.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import Block, ParallelSizes
from qerl_rl.layout.latent_slots import latent_attention_adapters, latent_attention_slots
from qerl_rl.layout.slot import FIRST_STAGE, Piece, Slot, find_tensor

__all__ = ["FIRST_STAGE", "Piece", "Slot", "adapter_slots", "find_tensor", "trained_slots", "weight_slots"]

SCORE = "score.weight"
"""HF name of a value head, [1, hidden]."""

ROUTER_BIAS = "gate.e_score_correction_bias"
"""HF name, inside the MoE block, of what is added to the experts' scores in the choice."""

LANGUAGE_MODEL, VALUE = "language_model", "value"
"""What the output layer of a model gives for each token: logits over the vocabulary, or one number."""


def weight_slots(architecture: MoeArchitecture, sizes: ParallelSizes, head: str = LANGUAGE_MODEL) -> list[Slot]:
    """Slots of all weights of a model with this head, in the order of the model."""
    slots = [_embedding(architecture, sizes)]
    for layer in range(architecture.layers):
        prefix = f"model.layers.{layer}."
        slots += _norm(layer, "input_layernorm", f"{prefix}input_layernorm", architecture)
        slots += _attention_slots(architecture, layer)
        slots += _norm(layer, "pre_mlp_layernorm", f"{prefix}post_attention_layernorm", architecture)
        if architecture.has_experts(layer):
            slots += _expert_slots(architecture, layer)
            slots += _shared_expert_slots(architecture, layer)
        else:
            slots += _mlp_slots(architecture, layer, "mlp", f"{prefix}mlp", architecture.dense_width)
    slots += _norm(architecture.layers, "decoder.final_layernorm", "model.norm", architecture)
    if head == VALUE:
        slots.append(value_head_slot(architecture))
    elif not architecture.tied_embeddings or sizes.pipeline > 1:
        slots.append(_output_layer(architecture, sizes))
    if head == LANGUAGE_MODEL and architecture.output_bias:
        bias = _vocabulary(architecture, sizes, "lm_head.bias")
        slots.append(Slot(architecture.layers, "output_layer.bias", *bias))
    return slots


def padded_vocabulary(architecture: MoeArchitecture, sizes: ParallelSizes) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple of the tensor-parallel ranks."""
    return -(-architecture.vocabulary_size // sizes.tensor) * sizes.tensor


def _whole(layer: int, name: str, hf_name: str, architecture: MoeArchitecture, *shape: int) -> Slot:
    shape = shape or (architecture.hidden_size,)
    return Slot(layer, name, Block(shape), (Piece(hf_name, shape),))


def _norm(layer: int, name: str, hf_name: str, architecture: MoeArchitecture) -> list[Slot]:
    """The weight of a norm of hidden states, and its bias where it has one."""
    parameters = ("weight", "bias") if architecture.centered_norms else ("weight",)
    return [_whole(layer, f"{name}.{own}", f"{hf_name}.{own}", architecture) for own in parameters]


def _vocabulary(
    architecture: MoeArchitecture, sizes: ParallelSizes, hf_name: str, *columns: int
) -> tuple[Block, tuple[Piece, ...]]:
    rows = architecture.vocabulary_size
    block = Block((padded_vocabulary(architecture, sizes), *columns), split_dim=0)
    return block, (Piece(hf_name, (rows, *columns), (slice(0, rows),)),)


def _embedding(architecture: MoeArchitecture, sizes: ParallelSizes) -> Slot:
    block, pieces = _vocabulary(architecture, sizes, "model.embed_tokens.weight", architecture.hidden_size)
    return Slot(FIRST_STAGE, "embedding.word_embeddings.weight", block, pieces)


def _output_layer(architecture: MoeArchitecture, sizes: ParallelSizes) -> Slot:
    tied = architecture.tied_embeddings
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    block, pieces = _vocabulary(architecture, sizes, name, architecture.hidden_size)
    return Slot(architecture.layers, "output_layer.weight", block, pieces, exported=not tied)


def value_head_slot(architecture: MoeArchitecture) -> Slot:
    """The slot of the value head, named as transformers names it in models for sequence classification."""
    slot = _whole(architecture.layers, "output_layer.weight", SCORE, architecture, 1, architecture.hidden_size)
    return replace(slot, optional=True)


def _qkv_pieces(architecture: MoeArchitecture, prefix: str, suffix: str, columns: tuple[int, ...]) -> tuple[Piece, ...]:
    """q, k and v in Megatron's block [key-value heads, query heads of one + 2, head_dim, ...]."""
    queries = architecture.attention_heads // architecture.key_value_heads
    everything = slice(None)
    return (
        Piece(f"{prefix}q_proj.{suffix}", (architecture.query_size, *columns), (everything, slice(0, queries))),
        Piece(f"{prefix}k_proj.{suffix}", (architecture.key_value_size, *columns), (everything, queries)),
        Piece(f"{prefix}v_proj.{suffix}", (architecture.key_value_size, *columns), (everything, queries + 1)),
    )


def _qkv_block(architecture: MoeArchitecture, columns: tuple[int, ...]) -> Block:
    heads = architecture.attention_heads // architecture.key_value_heads + 2
    return Block((architecture.key_value_heads, heads, architecture.head_dim, *columns), split_dim=0)


def _attention_slots(architecture: MoeArchitecture, layer: int) -> list[Slot]:
    if architecture.latent:
        return latent_attention_slots(architecture, architecture.latent, layer)
    attention, hidden = f"model.layers.{layer}.self_attn.", architecture.hidden_size

    def linear_qkv(name: str, *columns: int) -> Slot:
        pieces = _qkv_pieces(architecture, attention, name, columns)
        block = _qkv_block(architecture, columns)
        return Slot(layer, f"self_attention.linear_qkv.{name}", block, pieces, quantizable=name == "weight")

    slots = [linear_qkv("weight", hidden)]
    if architecture.qkv_bias:
        slots.append(linear_qkv("bias"))
    if architecture.qk_norm:
        for kind in "qk":
            norm = f"self_attention.{kind}_layernorm.weight"
            slots.append(_whole(layer, norm, f"{attention}{kind}_norm.weight", architecture, architecture.head_dim))
    shape = (hidden, architecture.query_size)
    pieces = (Piece(f"{attention}o_proj.weight", shape),)
    slots.append(Slot(layer, "self_attention.linear_proj.weight", Block(shape, 1), pieces, quantizable=True))
    if architecture.projection_bias:
        slots.append(_whole(layer, "self_attention.linear_proj.bias", f"{attention}o_proj.bias", architecture))
    return slots


def _expert_slots(architecture: MoeArchitecture, layer: int) -> list[Slot]:
    prefix = f"model.layers.{layer}.{architecture.mlp_name}."
    experts, width, hidden = architecture.experts, architecture.expert_width, architecture.hidden_size
    gate, up, down = architecture.expert_weight_names
    w13 = [
        Piece(f"{prefix}experts.{expert}.{name}.weight", (width, hidden), (expert, row))
        for expert in range(experts)
        for row, name in enumerate((gate, up))
    ]
    w2 = [Piece(f"{prefix}experts.{expert}.{down}.weight", (hidden, width), (expert,)) for expert in range(experts)]
    w13_block, w2_block = _expert_blocks(architecture)
    router = [_whole(layer, "mlp.router.weight", f"{prefix}gate.weight", architecture, experts, hidden)]
    if architecture.routing.has_bias:
        bias = _whole(layer, "mlp.router.expert_bias", f"{prefix}{ROUTER_BIAS}", architecture, experts)
        router.append(replace(bias, dtype=torch.float32))
    return [
        *router,
        Slot(layer, "mlp.experts.w13", w13_block, tuple(w13), quantizable=True),
        Slot(layer, "mlp.experts.w2", w2_block, tuple(w2), quantizable=True),
    ]


def _expert_blocks(architecture: MoeArchitecture) -> tuple[Block, Block]:
    experts, width, hidden = architecture.experts, architecture.expert_width, architecture.hidden_size
    return Block((experts, 2, width, hidden), 2, is_expert=True), Block((experts, hidden, width), 2, is_expert=True)


def _mlp_slots(architecture: MoeArchitecture, layer: int, name: str, hf_name: str, width: int) -> list[Slot]:
    """A gated MLP: Megatron's fc1 has the rows of gate, then those of up."""
    hidden = architecture.hidden_size
    gate_up = tuple(
        Piece(f"{hf_name}.{leaf}.weight", (width, hidden), (row,)) for row, leaf in enumerate(("gate_proj", "up_proj"))
    )
    down = (Piece(f"{hf_name}.down_proj.weight", (hidden, width)),)
    return [
        Slot(layer, f"{name}.linear_fc1.weight", Block((2, width, hidden), 1), gate_up, quantizable=True),
        Slot(layer, f"{name}.linear_fc2.weight", Block((hidden, width), 1), down, quantizable=True),
    ]


def _shared_expert_slots(architecture: MoeArchitecture, layer: int) -> list[Slot]:
    width, name = architecture.shared_expert_width, "mlp.shared_experts"
    if not width:
        return []
    shared = f"model.layers.{layer}.{architecture.mlp_name}.{architecture.names.shared_expert}"
    slots = _mlp_slots(architecture, layer, name, shared, width)
    if architecture.shared_expert_gate:
        gate = f"{shared}_gate.weight"
        slots.append(_whole(layer, f"{name}.gate_weight", gate, architecture, 1, architecture.hidden_size))
    return slots


def trained_slots(architecture: MoeArchitecture, lora: LoraConfig, head: str) -> list[Slot]:
    """Slots of all that trains over a frozen base: the adapters, and the head of a value model."""
    return adapter_slots(architecture, lora) + ([value_head_slot(architecture)] if head == VALUE else [])


def adapter_slots(architecture: MoeArchitecture, lora: LoraConfig) -> list[Slot]:
    """Slots of all adapters; a piece is a tensor of the exchange format.

    The rows of a qkv_proj B come as three pieces named ...lora_B:q, :k and :v, which are concatenated in this order.
    Dense layers have those of shared experts: of the MLP that every token passes.
    """
    slots = []
    for layer in range(architecture.layers):
        if lora.attention:
            slots += _attention_adapters(architecture, layer, lora.rank)
        if architecture.has_experts(layer):
            if lora.experts:
                slots += _expert_adapters(architecture, layer, lora.rank)
            if lora.shared_experts and architecture.shared_expert_width:
                name, exchanged = "mlp.shared_experts", f"mlp.{architecture.names.shared_expert}"
                slots += _mlp_adapters(
                    architecture, layer, name, exchanged, architecture.shared_expert_width, lora.rank
                )
        elif lora.shared_experts:
            slots += _mlp_adapters(architecture, layer, "mlp", "mlp", architecture.dense_width, lora.rank)
    return slots


def _attention_adapters(architecture: MoeArchitecture, layer: int, rank: int) -> list[Slot]:
    prefix, hidden = f"model.layers.{layer}.self_attn.", architecture.hidden_size
    name, outputs = "self_attention.linear_", architecture.attention_output_size
    if architecture.latent:
        slots = latent_attention_adapters(architecture, architecture.latent, layer, rank)
    else:
        qkv_b = tuple(
            replace(piece, name=f"{prefix}qkv_proj.lora_B:{kind}")
            for kind, piece in zip("qkv", _qkv_pieces(architecture, "", "", (rank,)), strict=True)
        )
        slots = [
            _whole(layer, f"{name}qkv.weight_lora_A", f"{prefix}qkv_proj.lora_A", architecture, rank, hidden),
            Slot(layer, f"{name}qkv.weight_lora_B", _qkv_block(architecture, (rank,)), qkv_b),
        ]
    proj_a = Piece(f"{prefix}o_proj.lora_A", (rank, outputs))
    return [
        *slots,
        Slot(layer, f"{name}proj.weight_lora_A", Block(proj_a.shape, 1), (proj_a,)),
        _whole(layer, f"{name}proj.weight_lora_B", f"{prefix}o_proj.lora_B", architecture, hidden, rank),
    ]


def _mlp_adapters(
    architecture: MoeArchitecture, layer: int, name: str, exchanged: str, width: int, rank: int
) -> list[Slot]:
    """Of a gated MLP. exchanged: what the exchange format names it inside a layer."""
    prefix, megatron, hidden = f"model.layers.{layer}.{exchanged}.", f"{name}.linear_", architecture.hidden_size
    gate_up_b = Piece(f"{prefix}gate_up_proj.lora_B", (2 * width, rank))
    down_a = Piece(f"{prefix}down_proj.lora_A", (rank, width))
    return [
        _whole(layer, f"{megatron}fc1.weight_lora_A", f"{prefix}gate_up_proj.lora_A", architecture, rank, hidden),
        Slot(layer, f"{megatron}fc1.weight_lora_B", Block((2, width, rank), 1), (gate_up_b,)),
        Slot(layer, f"{megatron}fc2.weight_lora_A", Block((rank, width), 1), (down_a,)),
        _whole(layer, f"{megatron}fc2.weight_lora_B", f"{prefix}down_proj.lora_B", architecture, hidden, rank),
    ]


def _expert_adapters(architecture: MoeArchitecture, layer: int, rank: int) -> list[Slot]:
    prefix = f"model.layers.{layer}.mlp.experts."
    experts, width, hidden = architecture.experts, architecture.expert_width, architecture.hidden_size

    def slot(name: str, shape: tuple[int, ...], block: Block) -> Slot:
        return Slot(layer, f"mlp.experts.{name.replace('.', '_')}", block, (Piece(prefix + name, shape),))

    w13_b = Block((experts, 2, width, rank), 2, is_expert=True)
    shapes = {
        "w13.lora_A": ((experts, rank, hidden), None),
        "w2.lora_A": ((experts, rank, width), 2),
        "w2.lora_B": ((experts, hidden, rank), None),
    }
    slots = [slot(name, shape, Block(shape, split, is_expert=True)) for name, (shape, split) in shapes.items()]
    slots.insert(1, slot("w13.lora_B", (experts, 2 * width, rank), w13_b))
    return slots
