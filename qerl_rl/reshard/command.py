"""The command line of `python -m qerl_rl reshard-plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError

DESCRIPTION = (
    "Print what one swap of a launch file moves: bytes of each rank and each class of link, beside the fewest there "
    "could be. It needs the model's config.json and starts nothing."
)


def add_parser(commands: Any) -> None:
    """Add `reshard-plan` to the subcommands."""
    parser = commands.add_parser("reshard-plan", help="what a swap of a launch file moves", description=DESCRIPTION)
    parser.add_argument("--config", type=Path, required=True, help="launch file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the launch file, set anew")
    parser.add_argument("--ranks-per-node", type=int, default=8, help="workers that share a machine (default 8)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Plan and print. Raises: ConfigError for a launch file or a layout that can't work."""
    from qerl_rl.config.checks import check_config
    from qerl_rl.config.loader import load_config
    from qerl_rl.layout.architecture import MoeArchitecture
    from qerl_rl.reshard.moved import plan_of

    loaded = load_config(options.config, options.overrides)
    check_config(loaded.config, loaded.locate)
    config = loaded.config
    if options.ranks_per_node < 1:
        raise ConfigError(f"--ranks-per-node {options.ranks_per_node} is no number of workers.", fix="give 1 or more")
    architecture = MoeArchitecture.from_folder(config.model.path)
    plan = plan_of(config, architecture, options.ranks_per_node)
    what = "adapters" if config.lora.rank else f"all weights, {config.quant.format}"
    print(f"{config.cluster.workers} ranks, {options.ranks_per_node} a node: {what}")
    print(plan.summary())
