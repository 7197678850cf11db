"""MiniCPM-MoE (arXiv 2404.06395): a Mixtral with scales, whose code comes with its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.families.common import grouped_heads, unsupported_anywhere, unsupported_rope
from qerl_rl.layout.parts import ModuleNames, Scales

DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": True}
NAMES = ModuleNames("mlp", "w1", "w3", "w2")


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings, what each part of a layer adds, and what the output layer reads are multiplied by constants."""
    return {
        **grouped_heads(config),
        "experts": config["num_experts"],
        "expert_width": config["intermediate_size"],
        "shared_expert_width": 0,
        "normalized_top_k": True,
        "qk_norm": False,
        "qkv_bias": False,
        "scales": Scales(
            embedding=float(config["scale_emb"]),
            residual=float(config["scale_depth"]) / math.sqrt(config["num_hidden_layers"]),
            output=float(config["dim_model_base"]) / config["hidden_size"],
        ),
        "names": NAMES,
    }


def unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """MiniCPM without experts is another model."""
    return {
        "num_experts": not config.get("num_experts"),
        **unsupported_rope(config),
        **unsupported_anywhere(config),
    }
