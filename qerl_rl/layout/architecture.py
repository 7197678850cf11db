"""The shape of a MoE language model, read from the config.json of its HF folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.routing import RoutingRule, chosen_rule
from qerl_rl.quant.checkpoint import read_config

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")


@dataclass(frozen=True)
class MoeArchitecture:
    """Sizes and switches of the model; `expert_width`, `shared_expert_width` are MLP intermediate sizes (0: none)."""

    family: str
    layers: int
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    expert_width: int
    shared_expert_width: int
    vocabulary_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    normalized_top_k: bool
    """Router probabilities of the chosen experts sum to 1 (otherwise they are their share of the softmax over all)."""
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool

    @classmethod
    def from_folder(cls, path: str | Path) -> MoeArchitecture:
        """Read `config.json` of a HF checkpoint folder, as transformers 4 or 5 writes it.

        Raises: ConfigError when there is none, or for what the trainer does not compute (an unknown family, dense
        layers, sliding windows, scaled rope, biases outside q, k, v, top-1 routing).
        """
        config = read_config(Path(path))
        where = str(Path(path) / "config.json")
        family = config.get("model_type", "")
        if family not in FAMILIES:
            raise ConfigError(
                f"model_type={family or 'missing'} is not supported.",
                fix=f"use a model of the families {', '.join(FAMILIES)}",
                where=where,
            )
        _reject_unsupported(config, where)
        try:
            return cls(**_sizes(family, config))
        except KeyError as error:
            raise ConfigError(
                f"config.json has no {error.args[0]}.", fix="copy the model's config.json again", where=where
            ) from None

    @property
    def query_size(self) -> int:
        """Outputs of all query heads."""
        return self.attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Outputs of all key (or of all value) heads."""
        return self.key_value_heads * self.head_dim

    @property
    def routing(self) -> RoutingRule:
        """How the model's routers choose and weigh experts."""
        return RoutingRule(top_k=self.experts_per_token, normalized=self.normalized_top_k)

    @property
    def mlp_name(self) -> str:
        """Name of the MoE block inside a HF layer."""
        return "block_sparse_moe" if self.family == "mixtral" else "mlp"

    @property
    def expert_weight_names(self) -> tuple[str, str, str]:
        """HF names of an expert's gate, up and down projection."""
        return ("w1", "w3", "w2") if self.family == "mixtral" else ("gate_proj", "up_proj", "down_proj")


def _sizes(family: str, config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {}
    qwen2, mixtral = family == "qwen2_moe", family == "mixtral"
    return {
        "family": family,
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": heads,
        "key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        # transformers 5 renamed num_experts of Qwen3-MoE.
        "experts": config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_width": config["intermediate_size"] if mixtral else config["moe_intermediate_size"],
        "shared_expert_width": config["shared_expert_intermediate_size"] if qwen2 else 0,
        "vocabulary_size": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
        "normalized_top_k": mixtral or bool(config.get("norm_topk_prob", False)),
        "qk_norm": family == "qwen3_moe",
        "qkv_bias": qwen2 and bool(config.get("qkv_bias", True)),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _reject_unsupported(config: dict[str, Any], where: str) -> None:
    """Raise ConfigError for settings whose computation the trainer does not have."""
    rope_key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(rope_key) or {}
    sliding = config.get("sliding_window") and config.get("use_sliding_window", config["model_type"] == "mixtral")
    unsupported = {
        "mlp_only_layers": bool(config.get("mlp_only_layers")),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1) != 1,
        "sliding_window": bool(sliding) and config["sliding_window"] < config["max_position_embeddings"],
        rope_key: rope.get("rope_type", rope.get("type", "default")) != "default",
        "attention_bias": bool(config.get("attention_bias", False)),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "num_experts_per_tok": config.get("num_experts_per_tok") == 1,
    }
    for key, found in unsupported.items():
        if found:
            raise ConfigError(
                f"{key}={config.get(key)} is not supported by the trainer.",
                fix="use a model with MoE in every layer, full attention, plain rope, silu and top-2 routing or wider",
                where=where,
            )


def check_layout(architecture: MoeArchitecture, train: TrainConfig) -> None:
    """Raise ConfigError when a parallel size of the trainer does not divide what it splits of this model, or when its
    routers can't work as train says."""
    splits = [
        ("tensor_parallel", "key-value heads", architecture.key_value_heads),
        ("tensor_parallel", "intermediate columns of the shared expert", architecture.shared_expert_width),
        ("pipeline_parallel", "layers", architecture.layers),
        ("expert_parallel", "experts", architecture.experts),
        ("expert_tensor_parallel", "intermediate columns of an expert", architecture.expert_width),
    ]
    for key, what, count in splits:
        ways = getattr(train, key)
        if count % ways:
            fitting = [size for size in range(1, ways) if count % size == 0]
            raise ConfigError(
                f"train.{key}={ways} does not divide the model's {count} {what}.",
                fix=f"set train.{key} to {' or '.join(map(str, fitting))}",
            )
    if train.tensor_parallel > 1 and not train.sequence_parallel:
        raise ConfigError(
            f"train.sequence_parallel=false with train.tensor_parallel={train.tensor_parallel} trains no MoE.",
            fix="set train.sequence_parallel to true",
        )
    chosen_rule(architecture.routing, architecture.experts, train)
