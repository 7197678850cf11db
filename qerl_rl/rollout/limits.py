"""What the engine can't run, found out from the files alone (nothing here imports vLLM)."""

from __future__ import annotations

import json
from pathlib import Path

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RolloutConfig

TILE = 32
"""vLLM's int8 CPU expert kernel works on tiles of this many rows and columns."""


def check_expert_sizes(model_path: str | Path, rollout: RolloutConfig) -> None:
    """Raise ConfigError where a rank's share of an expert does not fill the tiles of the int8 CPU kernel."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if config["hidden_size"] % TILE or width % TILE:
        raise ConfigError(
            f"{model_path} has hidden size {config['hidden_size']} and expert width {width}.",
            fix=f"use a model where both are multiples of {TILE}",
        )
    if not rollout.expert_parallel and width % (TILE * rollout.tensor_parallel):
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} cuts experts of width {width} into parts that are no "
            f"multiples of {TILE}.",
            fix="set rollout.expert_parallel to true (whole experts on each rank)",
        )
