"""Start a run: `python launch.py --config configs/NAME.yaml [section.key=value ...] [--dry-run] [--resume auto]`.

Reads the launch file and the overrides, starts or joins Ray, runs the trainer. Exit codes: 0 done, 1 a run that failed,
2 wrong input (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import load_config
from qerl_rl.start_up import collector_paused


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.py", description="Reinforcement-learn a quantized MoE model.")
    parser.add_argument(
        "--config", required=True, metavar="YAML", help="a launch file, such as those in configs/, or MindSpeed-RL's"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print it, start nothing")
    parser.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="auto goes on from the newest complete checkpoint of run.output_dir (a fresh start if there is none), "
        "PATH from that one; never, the default, starts anew",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys to set on top of the file")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with collector_paused():
            from trainer.preflight import describe, preflight

        loaded = load_config(options.config, options.overrides)
        plan = preflight(loaded, options.resume, dry_run=options.dry_run)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    if loaded.translation:
        print(loaded.translation.describe())
    if options.dry_run:
        print(describe(plan))
        return 0
    with collector_paused():
        from trainer.run import run

    return run(plan)


if __name__ == "__main__":
    sys.exit(main())
