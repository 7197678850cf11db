"""`python -m qerl_rl COMMAND`: builds models, stores one in fewer bits, checks one or the machine, plans a swap."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.doctor.command import add_doctor
from qerl_rl.quant.command import add_quantize
from qerl_rl.quant.formats import FORMATS
from qerl_rl.reshard.command import add_parser as add_reshard_plan
from qerl_rl.verify.command import add_parser as add_verify


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (2 after a ConfigError, which is printed as one line on stderr)."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qerl_rl", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    make_model = commands.add_parser("make-model", help="build a quantized model to train")
    models = make_model.add_subparsers(required=True, metavar="MODEL")

    tiny = models.add_parser("tiny", help="a small Qwen3-MoE that has half learned arithmetic (about a minute)")
    tiny.add_argument("--seed", type=int, default=1, help="one seed always gives the same model (default 1)")
    tiny.add_argument(
        "--format", choices=("none", *FORMATS), default="w8a8", help="none: bfloat16, not quantized (default w8a8)"
    )
    tiny.set_defaults(run=_make_tiny)

    smollm2 = models.add_parser("smollm2-moe", help="SmolLM2-135M-Instruct as a mixture of 4 experts (about a minute)")
    smollm2.set_defaults(run=_make_smollm2_moe)
    for model in (tiny, smollm2):
        model.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    add_quantize(commands)
    add_verify(commands)
    add_reshard_plan(commands)
    add_doctor(commands)
    return parser


def _writable_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Creating the folder proves nothing when it exists already and belongs to someone else.
        probe = folder / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--out {folder} can't be written: {error.strerror}.", fix="give a folder that you may write to"
        ) from None
    return folder


def _quiet_libraries() -> None:
    """Hide the libraries' own progress bars and warnings, which would tear ours apart."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)


def _make_tiny(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    out = _writable_folder(options.out)
    console.print("Building a Qwen3-MoE (4 layers, 8 experts, top-2) and teaching it to add and subtract ...")
    from qerl_rl.make_model import warm_start
    from qerl_rl.make_model.tiny import SIZES, make_tiny

    _quiet_libraries()
    settings = warm_start.WarmStart()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("expected reward {task.fields[reward]:.2f}  step {task.fields[step]}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        fields: dict[str, Any] = {"reward": 0.0, "step": 0, "loss": float("nan")}
        skill = bar.add_task("learning true answers ", total=settings.skill, **fields)
        doubt = bar.add_task("then half wrong ones  ", total=settings.doubt_steps, start=False, **fields)

        def report(progress: warm_start.Progress) -> None:
            now: dict[str, Any] = {"reward": progress.reward, "step": progress.step, "loss": progress.loss}
            if progress.phase == "skill":
                bar.update(skill, completed=min(progress.reward, settings.skill), **now)
            else:
                bar.start_task(doubt)
                bar.update(doubt, advance=1, **now)

        made = make_tiny(out, options.seed, format=options.format, report=report)
    stored = {"none": "bfloat16", "w8a8": "W8A8 int8"}.get(options.format, options.format)
    console.print(
        f"Wrote {out}: {stored} Qwen3-MoE, {SIZES.layers} layers x {SIZES.experts} experts, "
        f"{made.weight_bytes / 2**20:.1f} MiB; it gets {made.reward_at_start:.0%} of the sums right at temperature 1.",
        soft_wrap=True,
    )


def _make_smollm2_moe(options: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    out = _writable_folder(options.out)
    started = time.monotonic()
    with console.status("Loading SmolLM2-135M-Instruct, copying its MLPs into 4 experts, quantizing ..."):
        from qerl_rl.make_model.upcycle import EXPERTS, LARGEST_DIFFERENCE, TOP_K, make_smollm2_moe, smollm2_gguf

        smollm2_gguf()
        _quiet_libraries()
        made = make_smollm2_moe(out)
    console.print(
        f"Logits of the mixture and of the dense model differ by at most {made.largest_difference:.1e} "
        f"(allowed {LARGEST_DIFFERENCE:.0e}).",
        soft_wrap=True,
    )
    console.print(
        f"Wrote {out}: W8A8 int8 Qwen2-MoE, {EXPERTS} experts, top-{TOP_K}, {made.parameters / 1e6:.0f} M parameters, "
        f"{made.weight_bytes / 2**20:.0f} MiB, in {time.monotonic() - started:.0f} s.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
