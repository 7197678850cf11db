"""Phi-3.5-MoE (arXiv 2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.families.common import grouped_heads, rope_of, rope_type, unsupported_anywhere, unsupported_window
from qerl_rl.layout.families.mixtral import NAMES
from qerl_rl.layout.parts import LongRope
from qerl_rl.layout.routing import SPARSE_MIXER, SPARSE_MIXER_JITTER, RoutingRule


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layer norms with biases, biases in attention and output layer, experts chosen by SparseMixer."""
    jitter = float(config.get("router_jitter_noise", SPARSE_MIXER_JITTER))
    bias = bool(config.get("attention_bias", False))
    found = {
        **grouped_heads(config),
        "experts": config["num_local_experts"],
        "expert_width": config["intermediate_size"],
        "shared_expert_width": 0,
        "normalized_top_k": False,
        "rule": RoutingRule(config["num_experts_per_tok"], SPARSE_MIXER, normalized=False, jitter=jitter),
        "qk_norm": False,
        "qkv_bias": bias,
        "projection_bias": bias,
        "output_bias": bool(config.get("lm_head_bias", False)),
        "centered_norms": True,
        "names": NAMES,
    }
    if rope_type(config) != "longrope":
        return found
    rope = rope_of(config)[1]
    factors = tuple(map(float, rope["short_factor"]))
    original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    return {
        **found,
        "long_rope": LongRope(factors, float(rope["short_mscale"])),
        # Beyond these, transformers and vLLM turn by other factors, each by its own rule.
        "max_positions": original,
    }


def unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """Its attention has biases; its window, in published checkpoints, is as long as its context."""
    found = {
        **unsupported_window(config, used=True),
        rope_of(config)[0]: rope_type(config) not in ("default", "longrope"),
        **unsupported_anywhere(config),
        "num_experts_per_tok": config.get("num_experts_per_tok", 2) != 2,
    }
    return {key: value for key, value in found.items() if key != "attention_bias"}
