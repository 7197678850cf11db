"""What quantization, noise and routing replay do to the quickstart: `python -m benchmarks.ablation` (about 6 minutes).

Four runs from one seed over the same prompts: bf16, W8A8, W8A8 + AQN (noise), W8A8 + AQN + R3 (routing replay). The
bfloat16 model is what the W8A8 one is a rounding of. Writes ablation.png and ablation.md below --out, with the metrics
of each run beside them; docs/ablation.md keeps one outcome. No bars: it exits 1 when a run fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qerl_rl.metrics.tracker import read_metrics

ROOT = Path(__file__).parents[1]
COMPARED_STEPS, AVERAGED_STEPS = 5, 5


@dataclass(frozen=True)
class Variant:
    """One run: its name, the model's quant.format, the keys that make it, and how it is drawn."""

    name: str
    format: str
    keys: tuple[str, ...]
    colour: str


VARIANTS = (
    Variant("bf16", "none", ("noise.enabled=false",), "#7a7a7a"),
    Variant("W8A8", "w8a8", ("noise.enabled=false",), "#1f5fa8"),
    Variant("W8A8 + AQN", "w8a8", ("noise.enabled=true",), "#c05a1c"),
    Variant("W8A8 + AQN + R3", "w8a8", ("noise.enabled=true", "router_replay.mode=R3"), "#3a8f4d"),
)
PANELS = {
    "reward/mean": "reward",
    "entropy": "entropy\n(nats per token)",
    "rollout_vs_train/k3_kl": "KL of engine to trainer\n(k3, nats per token)",
    "rollout_vs_train/prob_diff_max": "largest difference\nof probabilities",
}
"""What is drawn, and its label; the mismatch on a logarithmic axis."""


def train(variant: Variant, model: Path, folder: Path, steps: int, seed: int) -> list[dict[str, Any]]:
    """Run the quickstart as `variant` and give its metrics, a dictionary a step."""
    launch = [sys.executable, "launch.py", "--config", "configs/quickstart_cpu.yaml", f"model.path={model}"]
    keys = [f"quant.format={variant.format}", f"run.output_dir={folder}", f"run.steps={steps}", f"run.seed={seed}"]
    # A busy machine takes its time to start the processes.
    rest = ["fault.start_timeout_s=900", "track.console=quiet", "checkpoint.export=false", f"eval.every={steps}"]
    rest += variant.keys
    begin = time.perf_counter()
    subprocess.run([*launch, *keys, *rest], cwd=ROOT, check=True)
    print(f"{variant.name}: {steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
    return read_metrics(folder / "metrics.jsonl")


def values(history: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """A metric by step; nan where a step has none."""
    found = [step.get(name) for step in history]
    return np.array([np.nan if value is None else value for value in found], dtype=np.float64)


def table(histories: dict[str, list[dict[str, Any]]]) -> str:
    """The runs in Markdown, a row each."""
    columns = ["reward, first 5", "last 5", "held-out pass@1", "entropy, last 5", "k3 KL, mean", "k3 KL, worst step"]
    columns += ["prob diff mean", "prob diff max, median", "prob diff max, worst step", "pearson, mean"]
    lines = [f"| run | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, history in histories.items():
        reward, mismatch = values(history, "reward/mean"), "rollout_vs_train/"
        held_out = values(history, "eval/pass@1")
        row = [
            f"{reward[:COMPARED_STEPS].mean():.3f}",
            f"{reward[-COMPARED_STEPS:].mean():.3f}",
            f"{held_out[-1]:.3f}",
            f"{values(history, 'entropy')[-COMPARED_STEPS:].mean():.3f}",
            f"{values(history, mismatch + 'k3_kl').mean():.1e}",
            f"{values(history, mismatch + 'k3_kl').max():.1e}",
            f"{values(history, mismatch + 'prob_diff_mean').mean():.4f}",
            f"{np.median(values(history, mismatch + 'prob_diff_max')):.3f}",
            f"{values(history, mismatch + 'prob_diff_max').max():.3f}",
            f"{values(history, mismatch + 'pearson').mean():.5f}",
        ]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def draw(histories: dict[str, list[dict[str, Any]]], image: Path) -> None:
    """The panels over the steps, one line a run; reward and entropy averaged over the last steps, faint as measured."""
    figure = Figure(figsize=(10.0, 6.4), dpi=130, layout="constrained")
    grid = figure.subplots(2, 2, sharex=True).flat
    for axes, (metric, label) in zip(grid, PANELS.items(), strict=True):
        is_mismatch = metric.startswith("rollout_vs_train/")
        for variant in VARIANTS:
            history = histories[variant.name]
            steps, curve = values(history, "step"), values(history, metric)
            if not is_mismatch:
                axes.plot(steps, curve, color=variant.colour, linewidth=0.8, alpha=0.35)
                curve = np.array([curve[max(0, end - AVERAGED_STEPS) : end].mean() for end in range(1, len(curve) + 1)])
            axes.plot(steps, curve, color=variant.colour, linewidth=1.3 if is_mismatch else 2.0, label=variant.name)
        if is_mismatch:
            # Steps differ a hundredfold, and single ones stick out: what a mean would smear.
            axes.set_yscale("log")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(VARIANTS), frameon=False)
    figure.savefig(image)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ablation")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    out = options.out.resolve()
    histories: dict[str, list[dict[str, Any]]] = {}
    for number, variant in enumerate(VARIANTS):
        model = out / f"model_{variant.format}_{options.seed}"
        if not (model / "qerl_rl.json").exists():
            make = [sys.executable, "-m", "qerl_rl", "make-model", "tiny", "--format", variant.format]
            subprocess.run([*make, "--out", str(model), "--seed", str(options.seed)], cwd=ROOT, check=True)
        try:
            histories[variant.name] = train(variant, model, out / f"run_{number}", options.steps, options.seed)
        except subprocess.CalledProcessError as error:
            print(f"{variant.name} ended with exit code {error.returncode}", file=sys.stderr)
            return 1
    text = table(histories)
    (out / "ablation.md").write_text(text, encoding="utf-8")
    draw(histories, out / "ablation.png")
    print(f"{text}\n{out / 'ablation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
