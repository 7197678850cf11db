"""The command line of `python -m qerl_rl verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qerl_rl.quant.formats import FORMATS

DESCRIPTION = (
    "Compare the trainer with transformers layer by layer, a quantized model with the exact one, and the rollout "
    "engine with the trainer. Exit code 0: all bars met; 1: one was missed, and is named; 2: wrong input."
)


def add_parser(commands: Any) -> None:
    """Add `verify` to the subcommands."""
    parser = commands.add_parser("verify", help="the accuracy gate of a checkpoint", description=DESCRIPTION)
    parser.add_argument("--model", type=Path, required=True, help="HF folder, quantized or not")
    parser.add_argument("--engine", choices=("vllm",), default="", help="also load this engine and compare log-probs")
    parser.add_argument("--format", choices=tuple(FORMATS), default="", help="also quantize an unquantized model to it")
    parser.add_argument("--reference", type=Path, help="unquantized checkpoint that --model must agree with")
    parser.add_argument("--layers", action="store_true", help="say how much each layer contributes to a mismatch")
    parser.add_argument(
        "--keep-worst", type=int, default=0, metavar="N", help="write a twin with the worst N layers kept"
    )
    parser.add_argument("--out", type=Path, help="folder for --keep-worst")
    parser.add_argument("--prompts", type=Path, help="text file, a prompt a line (default: seeded random tokens)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify and show the report; returns the exit code. Raises: ConfigError for wrong input."""
    from rich.console import Console

    from qerl_rl.verify.gate import Request, check_request, verify

    request = Request(
        model=options.model,
        engine=options.engine,
        format=options.format,
        reference=options.reference,
        by_layer=options.layers,
        keep_worst=options.keep_worst,
        out=options.out,
        prompts=options.prompts,
    )
    check_request(request)
    console = Console()
    with console.status("Comparing ..."):
        report = verify(request)
    report.show(console)
    return report.exit_code
