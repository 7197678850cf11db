"""What the model's own kind rules out of a launch file."""

from __future__ import annotations

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.rollout.families import check_family


def check_model_limits(loaded: LoadedConfig, architecture: MoeArchitecture) -> None:
    """Raise ConfigError for sequences beyond the model's positions, noise that has no norm, a family no engine runs."""
    config, key = loaded.config, "model.max_length"
    if config.model.max_length > architecture.max_positions:
        raise ConfigError(
            f"{key}={config.model.max_length} is beyond the {architecture.max_positions} positions that"
            f" {config.model.path} is trained at.",
            fix=f"set {key} to {architecture.max_positions} or less",
            where=loaded.locate(key),
        )
    if config.noise.enabled and architecture.centered_norms:
        raise ConfigError(
            f"noise.enabled=true draws noise on RMS norms, and {architecture.family} has layer norms.",
            fix="set noise.enabled to false",
            where=loaded.locate("noise.enabled"),
        )
    if config.has_rollout_engine:
        check_family(config.model.path)
