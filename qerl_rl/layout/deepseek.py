"""DeepSeek-V2 and V3: which slots their weights have in a Megatron model.

The trainer does not run them yet; their layouts are known so that a resharding of the largest models can be planned.
Names of Megatron-core 0.12.1: `MLASelfAttention` with layernorms of its own (local spec), MoE and dense MLP layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qerl_rl.layout.blocks import Block, ParallelSizes
from qerl_rl.layout.slots import FIRST_STAGE, Piece, Slot
from qerl_rl.quant.checkpoint import read_config

FAMILIES = ("deepseek_v2", "deepseek_v3")


def is_deepseek(path: str | Path) -> bool:
    """Whether a HF checkpoint folder is of these families."""
    return read_config(Path(path)).get("model_type") in FAMILIES


@dataclass(frozen=True)
class DeepseekArchitecture:
    """Sizes by the names of config.json, as far as shapes depend on them.

    The layer of multi-token prediction (num_nextn_predict_layers) is left out: neither engine keeps it in its model.
    """

    layers: int
    dense_layers: int
    """The first ones (first_k_dense_replace) have a dense MLP."""
    hidden_size: int
    attention_heads: int
    q_lora_rank: int | None
    """None: queries come from one projection."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    dense_width: int
    experts: int
    expert_width: int
    shared_experts: int
    vocabulary_size: int
    router_bias: bool
    """Experts are chosen by their score plus a bias of their own (topk_method noaux_tc of V3)."""
    family: str = "deepseek_v3"

    mlp_name = "mlp"
    tied_embeddings = False

    @classmethod
    def from_folder(cls, path: str | Path) -> DeepseekArchitecture:
        """Read `config.json` of a HF checkpoint folder of model_type deepseek_v2 or deepseek_v3."""
        config = read_config(Path(path))
        return cls(
            layers=config["num_hidden_layers"],
            dense_layers=config["first_k_dense_replace"],
            hidden_size=config["hidden_size"],
            attention_heads=config["num_attention_heads"],
            q_lora_rank=config["q_lora_rank"],
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            dense_width=config["intermediate_size"],
            experts=config["n_routed_experts"],
            expert_width=config["moe_intermediate_size"],
            shared_experts=config["n_shared_experts"] or 0,
            vocabulary_size=config["vocab_size"],
            router_bias=config.get("topk_method", "noaux_tc") == "noaux_tc",
            family=config["model_type"],
        )

    @property
    def shared_expert_width(self) -> int:
        """Intermediate columns of all shared experts, which are one MLP in both engines."""
        return self.shared_experts * self.expert_width


def deepseek_slots(architecture: DeepseekArchitecture, sizes: ParallelSizes) -> list[Slot]:
    """Slots of all weights, in the order of the model."""
    end, hidden = architecture.layers, architecture.hidden_size
    slots = [
        _vocabulary(FIRST_STAGE, "embedding.word_embeddings.weight", "model.embed_tokens.weight", architecture, sizes)
    ]
    for layer in range(architecture.layers):
        slots += _attention(architecture, layer)
        slots += _dense(architecture, layer) if layer < architecture.dense_layers else _moe(architecture, layer)
    slots.append(_slot(end, "decoder.final_layernorm.weight", "model.norm.weight", (hidden,)))
    return [*slots, _vocabulary(end, "output_layer.weight", "lm_head.weight", architecture, sizes)]


def _slot(
    layer: int,
    name: str,
    hf_name: str,
    shape: tuple[int, ...],
    split_dim: int | None = None,
    *,
    quantizable: bool = False,
    dtype: torch.dtype | None = None,
) -> Slot:
    return Slot(layer, name, Block(shape, split_dim), (Piece(hf_name, shape),), quantizable, dtype=dtype)


def _vocabulary(layer: int, name: str, hf_name: str, architecture: DeepseekArchitecture, sizes: ParallelSizes) -> Slot:
    rows, hidden = architecture.vocabulary_size, architecture.hidden_size
    padded = -(-rows // sizes.tensor) * sizes.tensor
    return Slot(layer, name, Block((padded, hidden), 0), (Piece(hf_name, (rows, hidden), (slice(0, rows),)),))


def _attention(architecture: DeepseekArchitecture, layer: int) -> list[Slot]:
    """Multi-latent attention. The up projections are [heads, rows of a head, columns]: heads are what is split.

    The down projections are column parallel in Megatron 0.12.1: it gathers their outputs.
    """
    prefix, name = f"model.layers.{layer}.", "self_attention."
    attention, heads, hidden = f"{prefix}self_attn.", architecture.attention_heads, architecture.hidden_size
    query = architecture.qk_nope_head_dim + architecture.qk_rope_head_dim
    key_value = architecture.qk_nope_head_dim + architecture.v_head_dim
    q_rank, kv_rank = architecture.q_lora_rank, architecture.kv_lora_rank

    def linear(leaf: str, hf_leaf: str, shape: tuple[int, ...], split_dim: int = 0) -> Slot:
        hf_name = f"{attention}{hf_leaf}.weight"
        return _slot(layer, f"{name}{leaf}.weight", hf_name, shape, split_dim, quantizable=True)

    slots = [_slot(layer, "input_layernorm.weight", f"{prefix}input_layernorm.weight", (hidden,))]
    if q_rank is None:
        slots.append(linear("linear_q_proj", "q_proj", (heads, query, hidden)))
    else:
        slots += [
            linear("linear_q_down_proj", "q_a_proj", (q_rank, hidden)),
            _slot(layer, f"{name}q_layernorm.weight", f"{attention}q_a_layernorm.weight", (q_rank,)),
            linear("linear_q_up_proj", "q_b_proj", (heads, query, q_rank)),
        ]
    post = f"{prefix}post_attention_layernorm.weight"
    return [
        *slots,
        linear("linear_kv_down_proj", "kv_a_proj_with_mqa", (kv_rank + architecture.qk_rope_head_dim, hidden)),
        _slot(layer, f"{name}kv_layernorm.weight", f"{attention}kv_a_layernorm.weight", (kv_rank,)),
        linear("linear_kv_up_proj", "kv_b_proj", (heads, key_value, kv_rank)),
        linear("linear_proj", "o_proj", (hidden, heads * architecture.v_head_dim), 1),
        _slot(layer, "pre_mlp_layernorm.weight", post, (hidden,)),
    ]


def _mlp(layer: int, name: str, hf_name: str, width: int, hidden: int) -> list[Slot]:
    """A gated MLP: Megatron's fc1 has the rows of gate, then those of up."""
    gate_up = tuple(
        Piece(f"{hf_name}.{leaf}.weight", (width, hidden), (row,)) for row, leaf in enumerate(("gate_proj", "up_proj"))
    )
    return [
        Slot(layer, f"{name}.linear_fc1.weight", Block((2, width, hidden), 1), gate_up, quantizable=True),
        _slot(layer, f"{name}.linear_fc2.weight", f"{hf_name}.down_proj.weight", (hidden, width), 1, quantizable=True),
    ]


def _dense(architecture: DeepseekArchitecture, layer: int) -> list[Slot]:
    return _mlp(layer, "mlp", f"model.layers.{layer}.mlp", architecture.dense_width, architecture.hidden_size)


def _moe(architecture: DeepseekArchitecture, layer: int) -> list[Slot]:
    prefix, hidden = f"model.layers.{layer}.mlp.", architecture.hidden_size
    experts, width = architecture.experts, architecture.expert_width
    w13 = tuple(
        Piece(f"{prefix}experts.{expert}.{leaf}.weight", (width, hidden), (expert, row))
        for expert in range(experts)
        for row, leaf in enumerate(("gate_proj", "up_proj"))
    )
    w2 = tuple(
        Piece(f"{prefix}experts.{expert}.down_proj.weight", (hidden, width), (expert,)) for expert in range(experts)
    )
    slots = [_slot(layer, "mlp.router.weight", f"{prefix}gate.weight", (experts, hidden))]
    if architecture.router_bias:
        bias = f"{prefix}gate.e_score_correction_bias"
        slots.append(_slot(layer, "mlp.router.expert_bias", bias, (experts,), dtype=torch.float32))
    slots += [
        Slot(layer, "mlp.experts.w13", Block((experts, 2, width, hidden), 2, is_expert=True), w13, quantizable=True),
        Slot(layer, "mlp.experts.w2", Block((experts, hidden, width), 2, is_expert=True), w2, quantizable=True),
    ]
    if architecture.shared_experts:
        shared = architecture.shared_expert_width
        slots += _mlp(layer, "mlp.shared_experts", f"{prefix}shared_experts", shared, hidden)
    return slots
