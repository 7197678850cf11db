"""Mixtral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.families.common import grouped_heads, unsupported_anywhere, unsupported_rope, unsupported_window
from qerl_rl.layout.parts import ModuleNames

NAMES = ModuleNames("block_sparse_moe", "w1", "w3", "w2")


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Experts as wide as a dense model's MLP, under names of their own."""
    return {
        **grouped_heads(config),
        "experts": config["num_local_experts"],
        "expert_width": config["intermediate_size"],
        "shared_expert_width": 0,
        "normalized_top_k": True,
        "qk_norm": False,
        "qkv_bias": False,
        "names": NAMES,
    }


def unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """A sliding window counts wherever config.json has one."""
    return {
        **unsupported_window(config, used=True),
        **unsupported_rope(config),
        **unsupported_anywhere(config),
    }
