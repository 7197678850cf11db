"""One file a family of models: what its config.json means, and what of it the trainer does not compute.

A family gives `sizes(config)`, the fields of MoeArchitecture beside those that all families spell alike (a KeyError
names what the config lacks), and `unsupported(config)`, key -> whether it says what the trainer does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_rl.layout.families import deepseek, minicpm, mixtral, phimoe, qwen


@dataclass(frozen=True)
class Family:
    """How to read the config.json of one model_type."""

    sizes: Callable[[Mapping[str, Any]], dict[str, Any]]
    unsupported: Callable[[Mapping[str, Any]], dict[str, bool]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What its configuration class fills in where published files say nothing."""


FAMILIES: dict[str, Family] = {
    "qwen3_moe": Family(qwen.qwen3_sizes, qwen.unsupported),
    "qwen2_moe": Family(qwen.qwen2_sizes, qwen.unsupported),
    "mixtral": Family(mixtral.sizes, mixtral.unsupported),
    "phimoe": Family(phimoe.sizes, phimoe.unsupported),
    "minicpm": Family(minicpm.sizes, minicpm.unsupported, minicpm.DEFAULTS),
    "deepseek_v2": Family(deepseek.v2_sizes, deepseek.v2_unsupported),
    "deepseek_v3": Family(deepseek.v3_sizes, deepseek.v3_unsupported),
}
"""By the model_type of config.json."""
