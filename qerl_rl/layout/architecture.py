"""The shape of a MoE language model, read from the config.json of its HF folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.families import FAMILIES, Family
from qerl_rl.layout.families.common import rope_of
from qerl_rl.layout.parts import NO_SCALES, USUAL_NAMES, LatentAttention, LongRope, ModuleNames, Scales, Yarn
from qerl_rl.layout.routing import RoutingRule
from qerl_rl.quant.checkpoint import read_config


@dataclass(frozen=True)
class MoeArchitecture:
    """Sizes and switches of the model; the widths are MLP intermediate sizes (0: none).

    What reads it asks for the property that matters, not for the family's name.
    """

    family: str
    layers: int
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    """Width of a query and of a key; a value's is `value_head_dim`."""
    experts: int
    experts_per_token: int
    expert_width: int
    shared_expert_width: int
    vocabulary_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    normalized_top_k: bool
    """Router scores of the chosen experts sum to 1 (otherwise they are their share of the softmax over all)."""
    qk_norm: bool
    qkv_bias: bool
    tied_embeddings: bool
    shared_expert_gate: bool = True
    """The shared expert's output is multiplied by the sigmoid of a projection of its own."""
    latent: LatentAttention | None = None
    yarn: Yarn | None = None
    rule: RoutingRule | None = None
    """None: the largest logits, weighed as `normalized_top_k` says."""
    dense_layers: int = 0
    """The first ones have one MLP in place of experts."""
    dense_width: int = 0
    names: ModuleNames = USUAL_NAMES
    centered_norms: bool = False
    """Layer norms (which subtract the mean and have a bias) and not RMS norms."""
    projection_bias: bool = False
    """The attention's output projection has a bias."""
    output_bias: bool = False
    """The output layer has one."""
    long_rope: LongRope | None = None
    scales: Scales = NO_SCALES

    @classmethod
    def from_folder(cls, path: str | Path) -> MoeArchitecture:
        """Read `config.json` of a HF checkpoint folder, as transformers 4 or 5 writes it.

        Raises: ConfigError when there is none, or for what the trainer does not compute (an unknown family, what a
        family's file in `families/` lists, biases outside q, k, v, top-1 routing).
        """
        config = read_config(Path(path))
        where = str(Path(path) / "config.json")
        name = config.get("model_type", "")
        family = FAMILIES.get(name)
        if family is None:
            raise ConfigError(
                f"model_type={name or 'missing'} is not supported.",
                fix=f"use a model of the families {', '.join(FAMILIES)}",
                where=where,
            )
        config = {**family.defaults, **config}
        _reject_unsupported(family, config, where)
        try:
            return cls(family=name, **{**_common_sizes(config), **family.sizes(config)})
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
    def value_head_dim(self) -> int:
        """Width of a value."""
        return self.latent.value_head_dim if self.latent else self.head_dim

    @property
    def attention_output_size(self) -> int:
        """Inputs of the attention's output projection."""
        return self.attention_heads * self.value_head_dim

    @property
    def routing(self) -> RoutingRule:
        """How the model's routers choose and weigh experts."""
        return self.rule or RoutingRule(top_k=self.experts_per_token, normalized=self.normalized_top_k)

    @property
    def mlp_name(self) -> str:
        """Name of the MoE block inside a HF layer."""
        return self.names.mlp

    @property
    def expert_weight_names(self) -> tuple[str, str, str]:
        """HF names of an expert's gate, up and down projection."""
        return self.names.gate, self.names.up, self.names.down

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is one of experts."""
        return layer >= self.dense_layers


def _common_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every family spells alike."""
    rope = rope_of(config)[1]
    return {
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "attention_heads": config["num_attention_heads"],
        "experts_per_token": config["num_experts_per_tok"],
        "vocabulary_size": config["vocab_size"],
        "max_positions": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"] if "rope_theta" in rope else config["rope_theta"]),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _reject_unsupported(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for settings whose computation the trainer does not have."""
    for key, found in family.unsupported(config).items():
        if found:
            raise ConfigError(
                f"{key}={config.get(key)} is not supported by the trainer.",
                fix="use a published model of this family: docs/families.md says what of each is computed",
                where=where,
            )
