"""What MindSpeed's and MindSpeed-LLM's feature managers ask for on a command line, out of a configuration of ours.

Names are those of Megatron's and MindSpeed's arguments (MindSpeed 2.3.0_core_r0.12.1: mindspeed/features_manager). The
values count twice: when patches are chosen, and again whenever a TransformerConfig is made, which MindSpeed completes
from them. So each one here has to be what `model.build.transformer_config` says.
"""

from __future__ import annotations

from typing import Any

from qerl_rl.config.mindspeed_checks import OF_DISPATCHER
from qerl_rl.config.schema import Config, TrainConfig

OPERATORS = {
    "use_fused_rmsnorm": "rms_norm",
    "use_fused_swiglu": "swiglu",
    "use_fused_rotary_pos_emb": "rotary",
    "use_flash_attn": "packed_attention",
    "moe_grouped_gemm": "grouped_matmul",
    OF_DISPATCHER: "token_permute",
}
"""Switches that choose between the kernel and the reference of an operator in `platform.ops`."""
PASSED_ON = ("optimization_level", "optimizer_selection", "use_ascend_mc2")
"""Switches that MindSpeed answers."""
MEGATRON = ("moe_layer_recompute",)
"""Switches that are Megatron's, which `model.build.transformer_config` sets."""


def left_out(train: TrainConfig) -> list[str]:
    """Operators that are to be computed by their references."""
    return [operator for switch, operator in OPERATORS.items() if not getattr(train.mindspeed, switch)]


def mindspeed_arguments(config: Config) -> dict[str, Any]:
    """Every argument that differs, or may differ, from what MindSpeed takes when nobody says anything."""
    train, switches = config.train, config.train.mindspeed
    return {
        **_layout(train),
        **_model_and_optimizer(config),
        # This project's modules stand in for the classes that these two replace.
        "use_fused_rmsnorm": switches.use_fused_rmsnorm,
        "use_fused_swiglu": switches.use_fused_swiglu,
        "use_fused_rotary_pos_emb": switches.use_fused_rotary_pos_emb,
        "use_flash_attn": switches.use_flash_attn,
        # Of these MindSpeed's answer would come before ours: experts and a dispatcher of its own.
        "moe_grouped_gemm": False,
        OF_DISPATCHER: False,
        **{name: getattr(switches, name) for name in PASSED_ON},
    }


def command_line(arguments: dict[str, Any]) -> list[str]:
    """The same as words of a command line; what is false or None is left out, which is what argparse takes it for."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def _layout(train: TrainConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": train.tensor_parallel,
        "pipeline_model_parallel_size": train.pipeline_parallel,
        "expert_model_parallel_size": train.expert_parallel,
        "expert_tensor_parallel_size": train.expert_tensor_parallel,
        "context_parallel_size": 1,
        "sequence_parallel": train.tensor_parallel > 1,
        "moe_token_dispatcher_type": train.token_dispatcher,
    }


def _model_and_optimizer(config: Config) -> dict[str, Any]:
    train = config.train
    granularity = None if train.recompute == "none" else train.recompute
    full = granularity == "full"
    return {
        "position_embedding_type": "rope",
        "transformer_impl": "local",
        "bf16": train.dtype == "bfloat16",
        "recompute_granularity": "selective" if train.mindspeed.moe_layer_recompute else granularity,
        "recompute_method": train.recompute_method if full else None,
        "recompute_num_layers": train.recompute_layers if full else None,
        "moe_router_load_balancing_type": "none",
        "optimizer": "adam",
        "use_distributed_optimizer": True,
        "use_legacy_models": False,
        "seed": config.run.seed,
        "lr": train.learning_rate,
        "weight_decay": train.weight_decay,
        "clip_grad": train.max_grad_norm,
    }
