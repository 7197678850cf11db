"""What the config.json of several families says in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def rope_of(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key that describes rotary positions, as transformers 5 or 4 names it, and what it says."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    return key, config.get(key) or {}


def rope_type(config: Mapping[str, Any]) -> str:
    """default, yarn, linear, ..."""
    rope = rope_of(config)[1]
    return str(rope.get("rope_type", rope.get("type", "default")))


def grouped_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of an attention whose key-value heads may be fewer."""
    heads = config["num_attention_heads"]
    return {
        "key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
    }


def unsupported_anywhere(config: Mapping[str, Any]) -> dict[str, bool]:
    """What no family's trainer has."""
    return {
        "attention_bias": bool(config.get("attention_bias", False)),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "num_experts_per_tok": config.get("num_experts_per_tok") == 1,
    }


def unsupported_rope(config: Mapping[str, Any]) -> dict[str, bool]:
    """Rotary positions that are scaled."""
    return {rope_of(config)[0]: rope_type(config) != "default"}


def unsupported_window(config: Mapping[str, Any], used: bool) -> dict[str, bool]:
    """Attention that sees a window only. used: what it means when config.json does not say."""
    window = config.get("sliding_window") if config.get("use_sliding_window", used) else None
    return {"sliding_window": bool(window) and config["sliding_window"] < config["max_position_embeddings"]}
