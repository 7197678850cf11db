"""`python -m qerl_rl quantize`: a checkpoint in another weight format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import read_config
from qerl_rl.quant.formats import FORMATS, GROUP_SIZES
from qerl_rl.quant.quantize import Written, quantize_checkpoint

LAYOUTS = ("compressed-tensors", "msmodelslim")


def add_quantize(commands: Any) -> None:
    """Add the subcommand to `commands`, what argparse's add_subparsers returned."""
    command = commands.add_parser(
        "quantize",
        help="store a checkpoint's weights in fewer bits",
        description="Writes the quantized twin of a HF checkpoint, file by file. Router, norms, embeddings and output "
        "layer stay as they are. An AWQ or GPTQ checkpoint is converted exactly (--format w4a16).",
    )
    command.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    command.add_argument("--format", required=True, choices=sorted(FORMATS), help="what to quantize to")
    command.add_argument("--out", type=Path, required=True, help="folder to write to")
    sizes = "; ".join(f"{name}: {', '.join(map(str, GROUP_SIZES[name]))}" for name in ("w4a16", "w4a8"))
    command.add_argument(
        "--group-size", type=int, default=0, help=f"weights that share a scale, -1 for a whole row ({sizes})"
    )
    command.add_argument("--keep-first", type=int, default=0, metavar="N", help="leave the first N layers as they are")
    command.add_argument("--keep-last", type=int, default=0, metavar="N", help="leave the last N layers as they are")
    command.add_argument("--keep-layers", default="", metavar="3,5", help="leave these layers, counted from 0")
    command.add_argument(
        "--attention",
        default="",
        choices=("", "none", *sorted(FORMATS)),
        help="format of attention, dense MLPs and shared experts; none leaves them (default: as --format)",
    )
    command.add_argument("--layout", default=LAYOUTS[0], choices=LAYOUTS, help="msmodelslim: as vLLM-Ascend reads it")
    command.add_argument(
        "--calibrate", type=Path, metavar="DATA", help="choose scales by what the model does with this text (.jsonl)"
    )
    command.add_argument("--calibrator", default="gptq", choices=("gptq", "awq"), help="how (default gptq)")
    command.set_defaults(run=run_quantize)


def run_quantize(options: argparse.Namespace) -> None:
    """Quantize as the command line says, with a progress bar and a closing line. Raises: ConfigError."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    arguments: dict[str, Any] = {
        "group_size": options.group_size,
        "attention": options.attention,
        "keep_layers": _kept_layers(options),
    }
    if options.calibrate:
        from qerl_rl.quant.calibrate import calibrate

        if options.layout != LAYOUTS[0]:
            raise ConfigError("--calibrate writes compressed-tensors' layout only.", fix="leave out --layout")
        written = calibrate(
            options.model, options.out, options.format, data=options.calibrate, method=options.calibrator, **arguments
        )
    else:
        columns = (TextColumn("quantizing"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=None)
            written = quantize_checkpoint(
                options.model,
                options.out,
                options.format,
                layout=options.layout,
                report=lambda done, total: bar.update(task, completed=done, total=total),
                **arguments,
            )
    console.print(_closing_line(options, written), soft_wrap=True, highlight=False)


def _kept_layers(options: argparse.Namespace) -> set[int]:
    try:
        kept = {int(layer) for layer in options.keep_layers.split(",") if layer}
    except ValueError:
        raise ConfigError(
            f"--keep-layers {options.keep_layers} is no list of numbers.", fix="give them like 3,5"
        ) from None
    if not options.model.is_dir():
        raise ConfigError(f"model folder {options.model} does not exist.", fix="give --model a HF checkpoint folder")
    layers = read_config(options.model).get("num_hidden_layers", 0)
    kept |= set(range(options.keep_first)) | set(range(layers - options.keep_last, layers))
    outside = sorted(layer for layer in kept if not 0 <= layer < layers)
    if outside:
        raise ConfigError(
            f"the model has layers 0 to {layers - 1}, not {', '.join(map(str, outside))}.",
            fix="correct --keep-first, --keep-last or --keep-layers",
        )
    return kept


def _closing_line(options: argparse.Namespace, written: Written) -> str:
    sizes = f"{written.source_bytes / 2**20:.1f} -> {written.weight_bytes / 2**20:.1f} MiB"
    if written.error is not None:
        lost = f"relative error {written.error:.4f}"
    else:
        lost = "scaled and rounded by AWQ" if options.calibrate else "converted exactly"
    return f"Wrote {options.out}: {written.quantized} matrices in {options.format}, {sizes}, {lost}."
