"""The Megatron model of this rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.fit import check_layout
from qerl_rl.layout.routing import chosen_rule
from qerl_rl.layout.slots import LANGUAGE_MODEL, VALUE, padded_vocabulary
from qerl_rl.model.adapted import LayerWeights
from qerl_rl.model.experts import StackedExperts
from qerl_rl.model.formats import SlotFormats, check_format_layout
from qerl_rl.model.latent_attention import PackedLatentAttention
from qerl_rl.model.linear import ColumnLinear, RowLinear
from qerl_rl.model.lora import initialize_adapters
from qerl_rl.model.parallel import current_sizes, initialize_parallel
from qerl_rl.model.routing_replay import ReplayingLayer, ReplayingMoELayer
from qerl_rl.model.value_head import ValueHead
from qerl_rl.platform.torch_modules import PackedAttention, RMSNorm
from qerl_rl.quant.formats import Format

__all__ = ["build_model", "initialize_parallel", "transformer_config"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A logit that no token can have: its probability is exactly 0 and p * log p stays 0, which -inf would turn into NaN.
NO_TOKEN = -1e30


def build_model(
    architecture: MoeArchitecture,
    train: TrainConfig,
    lora: LoraConfig | None,
    formats: SlotFormats,
    *,
    head: str = LANGUAGE_MODEL,
    seed: int = 1,
) -> GPTModel:
    """Megatron's GPTModel of this rank, in train.dtype, with first adapters but base weights that `load_hf` must fill.

    Needs `prepare_megatron` and `initialize_parallel`. It takes packed sequences: model(input_ids [1, T], position_ids
    [1, T], attention_mask=None, packed_seq_params=PackedSeqParams(qkv_format="thd", ...)) gives logits [1, T,
    vocabulary of this rank] (T divisible by tensor_parallel), `NO_TOKEN` in columns that pad the vocabulary.
    With head=VALUE it gives values [1, T, 1] (`ValueHead`, which always trains) and no logits.
    `formats` are those of the checkpoint (`stored_formats`). With `lora` only adapters train; a quantized base without
    it trains norms, router, embeddings and biases.
    Float16Module is not needed: parameters are created in train.dtype.
    Raises: ConfigError when the layout does not fit the model or its formats.
    """
    sizes = current_sizes()
    check_layout(architecture, train)
    check_format_layout(architecture, formats, sizes)
    config = transformer_config(architecture, train)
    rule = chosen_rule(architecture.routing, architecture.experts, train)
    routing = {"rule": rule, "dispatcher": train.token_dispatcher}
    trains_base = lora is None
    model = GPTModel(
        config,
        _block_spec(architecture, lora, formats, sizes, routing),
        vocab_size=padded_vocabulary(architecture, sizes),
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        # Megatron sums the gradients of both copies of a tied embedding, and fails when a frozen one has none.
        share_embeddings_and_output_weights=head == LANGUAGE_MODEL
        and architecture.tied_embeddings
        and (sizes.pipeline == 1 or trains_base),
    )
    model.lora, model.head = lora, head
    if model.post_process and head == VALUE:
        model.output_layer = ValueHead(config)
    if lora is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_lora_" in name or (head == VALUE and name.startswith("output_layer.")))
        initialize_adapters(model, architecture, seed)
        if model.pre_process:
            # Recomputed layers whose input needs no gradient get none at all, without any error.
            model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    if model.post_process and head == LANGUAGE_MODEL:
        _mask_vocabulary_padding(model, architecture.vocabulary_size)
    return model


def transformer_config(architecture: MoeArchitecture, train: TrainConfig) -> TransformerConfig:
    """Megatron's configuration of the model and the layout."""
    dtype, stages = DTYPES[train.dtype], train.stage_layers
    kind = MLATransformerConfig if architecture.latent else TransformerConfig
    return kind(
        **_latent_sizes(architecture),
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.attention_heads,
        num_query_groups=architecture.key_value_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.dense_width or architecture.expert_width,
        moe_ffn_hidden_size=architecture.expert_width,
        moe_shared_expert_intermediate_size=architecture.shared_expert_width or None,
        num_moe_experts=architecture.experts,
        moe_router_topk=architecture.experts_per_token,
        # Routers follow a RoutingRule; Megatron demands this of those that take one expert a token.
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        # ReplayingMoELayer makes the one of train.token_dispatcher: Megatron refuses others under pipeline parallelism.
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=train.tensor_parallel,
        pipeline_model_parallel_size=train.pipeline_parallel,
        # Megatron wants stages left for what neither takes.
        num_layers_in_first_pipeline_stage=stages[0] if len(stages) > 1 else None,
        num_layers_in_last_pipeline_stage=stages[-1] if len(stages) > 2 else None,
        expert_model_parallel_size=train.expert_parallel,
        expert_tensor_parallel_size=train.expert_tensor_parallel,
        sequence_parallel=train.tensor_parallel > 1,
        variable_seq_lengths=train.pipeline_parallel > 1,
        batch_p2p_comm=False,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        perform_initialization=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_recompute(train),
    )


def _latent_sizes(architecture: MoeArchitecture) -> dict[str, Any]:
    latent = architecture.latent
    if latent is None:
        return {}
    return {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_head_dim": latent.nope_head_dim,
        "qk_pos_emb_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.value_head_dim,
        "rotary_base": architecture.rope_theta,
        # `PackedLatentAttention` turns and scales itself.
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }


def _recompute(train: TrainConfig) -> dict[str, Any]:
    if train.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": train.recompute_method,
            "recompute_num_layers": train.recompute_layers,
        }
    if train.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}
    if train.mindspeed.moe_layer_recompute:
        return {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    return {}


def _block_spec(
    architecture: MoeArchitecture,
    lora: LoraConfig | None,
    formats: SlotFormats,
    sizes: ParallelSizes,
    routing: Mapping[str, Any],
) -> TransformerBlockSubmodules:
    """Megatron's local layer spec with this project's norm, attention, linear layers and experts in it.

    Layers differ in how their weights are stored, and in whether they have experts.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first, end, *_ = [*sizes.first_layers(architecture.layers), architecture.layers][stage:]
    layers = []
    for number in range(first, end):
        own = {name: format for (layer, name), format in formats.items() if layer == number}
        if architecture.has_experts(number):
            mlp = _experts_spec(architecture, lora, own, routing)
        else:
            mlp = ModuleSpec(module=MLP, submodules=_mlp_submodules("mlp", lora, own))
        layers.append(_layer_spec(_attention_spec(architecture, lora, own), mlp))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(attention: ModuleSpec, mlp: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=ReplayingLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(
    architecture: MoeArchitecture, lora: LoraConfig | None, formats: Mapping[str, Format]
) -> ModuleSpec:
    """Args: formats: of the layer's weights, by the names of their slots."""
    of_attention = lora if lora and lora.attention else None

    def linear(kind: type[ColumnLinear | RowLinear], name: str, adapted: LoraConfig | None = of_attention) -> Any:
        return _linear(kind, formats.get(f"self_attention.{name}.weight"), adapted)

    params: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    if architecture.latent:
        submodules = MLASelfAttentionSubmodules(
            linear_q_proj=linear(ColumnLinear, "linear_q_proj"),
            linear_q_down_proj=linear(ColumnLinear, "linear_q_down_proj"),
            linear_q_up_proj=linear(ColumnLinear, "linear_q_up_proj"),
            linear_kv_down_proj=linear(ColumnLinear, "linear_kv_down_proj"),
            # Without an adapter: `latent_attention_adapters` says why.
            linear_kv_up_proj=linear(ColumnLinear, "linear_kv_up_proj", None),
            core_attention=PackedAttention,
            linear_proj=linear(RowLinear, "linear_proj"),
            q_layernorm=RMSNorm,
            kv_layernorm=RMSNorm,
        )
        params |= {"latent": architecture.latent, "yarn": architecture.yarn}
        return ModuleSpec(module=PackedLatentAttention, params=params, submodules=submodules)
    head_norm = RMSNorm if architecture.qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear(ColumnLinear, "linear_qkv"),
            core_attention=PackedAttention,
            linear_proj=linear(RowLinear, "linear_proj"),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _mlp_submodules(name: str, lora: LoraConfig | None, formats: Mapping[str, Format]) -> MLPSubmodules:
    """Of an MLP that every token passes."""
    adapted = lora if lora and lora.shared_experts else None
    return MLPSubmodules(
        linear_fc1=_linear(ColumnLinear, formats.get(f"{name}.linear_fc1.weight"), adapted),
        linear_fc2=_linear(RowLinear, formats.get(f"{name}.linear_fc2.weight"), adapted),
    )


def _experts_spec(
    architecture: MoeArchitecture, lora: LoraConfig | None, formats: Mapping[str, Format], routing: Mapping[str, Any]
) -> ModuleSpec:
    """Routed experts, and shared ones beside them. Args: routing: of `ReplayingMoELayer`."""
    prefix = "mlp.experts."
    of_experts = {name.removeprefix(prefix): format for name, format in formats.items() if name.startswith(prefix)}
    experts_weights = LayerWeights(of_experts, lora if lora and lora.experts else None)
    shared = ModuleSpec(
        module=SharedExpertMLP,
        params={"gate": architecture.shared_expert_gate},
        submodules=_mlp_submodules("mlp.shared_experts", lora, formats),
    )
    experts = ModuleSpec(module=StackedExperts, params={"weights": experts_weights})
    submodules = MoESubmodules(experts=experts, shared_experts=shared)
    return ModuleSpec(module=ReplayingMoELayer, submodules=submodules, params=dict(routing))


def _linear(kind: type[ColumnLinear | RowLinear], format: Format | None, lora: LoraConfig | None) -> Any:
    """A column- or row-parallel linear layer: Megatron's own where the weights are plain."""
    if format is None and lora is None:
        return ColumnParallelLinear if kind is ColumnLinear else RowParallelLinear
    return ModuleSpec(module=kind, params={"weights": LayerWeights({"weight": format} if format else {}, lora)})


def _mask_vocabulary_padding(model: GPTModel, vocabulary_size: int) -> None:
    """Give the columns that pad the vocabulary no probability; only the last tensor-parallel rank may have any."""
    columns = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    real = vocabulary_size - parallel_state.get_tensor_model_parallel_rank() * columns
    if real >= columns:
        return

    def mask(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        output[0][..., real:] = NO_TOKEN

    model.output_layer.register_forward_hook(mask)
