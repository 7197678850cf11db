"""Qwen3-MoE and Qwen2-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.families.common import grouped_heads, unsupported_anywhere, unsupported_rope, unsupported_window


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **grouped_heads(config),
        # transformers 5 renamed num_experts of Qwen3-MoE.
        "experts": config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
        "expert_width": config["moe_intermediate_size"],
        "normalized_top_k": bool(config.get("norm_topk_prob", False)),
    }


def qwen3_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Norms on the heads of queries and keys, no biases, no shared expert."""
    return {**_sizes(config), "shared_expert_width": 0, "qk_norm": True, "qkv_bias": False}


def qwen2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Biases on queries, keys and values, and a shared expert behind a gate."""
    return {
        **_sizes(config),
        "shared_expert_width": config["shared_expert_intermediate_size"],
        "qk_norm": False,
        "qkv_bias": bool(config.get("qkv_bias", True)),
    }


def unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """Dense layers in between are not there."""
    return {
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        **unsupported_window(config, used=False),
        **unsupported_rope(config),
        **unsupported_anywhere(config),
    }
