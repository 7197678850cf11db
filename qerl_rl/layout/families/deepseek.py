"""DeepSeek-V2 and DeepSeek-V3 (with R1 and V3.1, which are V3's architecture).

The layer of multi-token prediction (num_nextn_predict_layers) is left out: neither engine keeps it in its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.families.common import rope_of, rope_type, unsupported_anywhere
from qerl_rl.layout.parts import LatentAttention, ModuleNames, Yarn, yarn_scale
from qerl_rl.layout.routing import GROUP_LIMITED, SIGMOID, SOFTMAX, TOP_K, RoutingRule

NAMES = ModuleNames(shared_expert="shared_experts")


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return {
        "key_value_heads": config["num_attention_heads"],
        "head_dim": nope + rope,
        "latent": LatentAttention(
            query_rank=config["q_lora_rank"],
            key_value_rank=config["kv_lora_rank"],
            nope_head_dim=nope,
            rope_head_dim=rope,
            value_head_dim=config["v_head_dim"],
            interleaved=bool(config.get("rope_interleave", True)),
        ),
        "yarn": _yarn(config),
        "dense_layers": config.get("first_k_dense_replace", 0),
        "dense_width": config["intermediate_size"],
        "experts": config["n_routed_experts"],
        "expert_width": config["moe_intermediate_size"],
        # All shared experts are one MLP in both engines.
        "shared_expert_width": (config.get("n_shared_experts") or 0) * config["moe_intermediate_size"],
        "shared_expert_gate": False,
        "normalized_top_k": bool(config.get("norm_topk_prob", False)),
        "qk_norm": False,
        "qkv_bias": False,
        "names": NAMES,
    }


def _yarn(config: Mapping[str, Any]) -> Yarn | None:
    rope = rope_of(config)[1]
    if rope_type(config) != "yarn":
        return None
    factor, scale, scale_all = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
    factor_given = rope.get("attention_factor")
    if factor_given is None:
        factor_given = yarn_scale(factor)
        if scale and scale_all:
            factor_given = yarn_scale(factor, scale) / yarn_scale(factor, scale_all)
    return Yarn(
        factor=factor,
        original_positions=rope["original_max_position_embeddings"],
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=float(factor_given),
        scale_all=float(scale_all or 0),
    )


def v2_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Softmax scores; with topk_method group_limited_greedy a group counts as much as its best expert."""
    limited = config.get("topk_method") == "group_limited_greedy"
    rule = _rule(config, SOFTMAX, groups=config["n_group"] if limited else 1, best_of_group=1)
    return {**_sizes(config), "rule": rule}


def v3_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sigmoid scores with a bias in the choice (noaux_tc); a group counts as much as its two best experts."""
    rule = _rule(config, SIGMOID, groups=config["n_group"] or 1, best_of_group=2, has_bias=True)
    return {**_sizes(config), "rule": rule}


def _rule(
    config: Mapping[str, Any], scores: str, *, groups: int, best_of_group: int, has_bias: bool = False
) -> RoutingRule:
    return RoutingRule(
        top_k=config["num_experts_per_tok"],
        choice=GROUP_LIMITED if groups > 1 else TOP_K,
        scores=scores,
        normalized=bool(config.get("norm_topk_prob", False)),
        scaling=float(config.get("routed_scaling_factor", 1.0)),
        groups=groups,
        chosen_groups=config["topk_group"] if groups > 1 else 1,
        best_of_group=best_of_group,
        has_bias=has_bias,
    )


def _unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    return {
        "moe_layer_freq": config.get("moe_layer_freq", 1) != 1,
        rope_of(config)[0]: rope_type(config) not in ("default", "yarn") or rope_of(config)[1].get("truncate") is False,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        **unsupported_anywhere(config),
    }


def v2_unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """transformers ignores norm_topk_prob here, vLLM and DeepSeek's own code don't: no published model sets it."""
    return {
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "topk_method": config.get("topk_method", "greedy") not in ("greedy", "group_limited_greedy"),
        "scoring_func": config.get("scoring_func", "softmax") != "softmax",
        **_unsupported(config),
    }


def v3_unsupported(config: Mapping[str, Any]) -> dict[str, bool]:
    """Other ways to choose exist in no published model."""
    return {
        "topk_method": config.get("topk_method", "noaux_tc") != "noaux_tc",
        "scoring_func": config.get("scoring_func", "sigmoid") != "sigmoid",
        **_unsupported(config),
    }
