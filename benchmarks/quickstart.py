"""Does the quickstart learn, whatever the seed? `python -m benchmarks.quickstart` trains three seeds (about 7 minutes).

Each seed has a model of its own. Bars: reward at the start between 0.1 and 0.5, its rise (mean of the last 5 steps
minus mean of the first 5) at least 0.15, training at most 6 minutes, all processes together at most 12 GiB. Exits 1
below one.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qerl_rl.metrics.tracker import read_metrics

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3)
START, RISE, SECONDS, BYTES = (0.1, 0.5), 0.15, 360.0, 12 * 2**30


def train(seed: int, folder: Path) -> bool:
    """Build the model of `seed`, train it as the quickstart does, print the row; whether all bars are met."""
    model, run = folder / "model", folder / "run"
    make = [sys.executable, "-m", "qerl_rl", "make-model", "tiny", "--out", str(model), "--seed", str(seed)]
    subprocess.run(make, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    launch = [sys.executable, "launch.py", "--config", "configs/quickstart_cpu.yaml", f"model.path={model}"]
    begin = time.perf_counter()
    subprocess.run([*launch, f"run.output_dir={run}", f"run.seed={seed}", "track.console=quiet"], cwd=ROOT, check=True)
    seconds = time.perf_counter() - begin
    steps = read_metrics(run / "metrics.jsonl")
    rewards = [step["reward/mean"] for step in steps]
    first, last = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
    peak = max(step["memory/peak_bytes"] for step in steps)
    print(f"{seed:4}  {first:7.3f}  {last:7.3f}  {last - first:+7.3f}  {seconds:7.0f}  {peak / 2**30:8.2f}", flush=True)
    return START[0] <= first <= START[1] and last - first >= RISE and seconds <= SECONDS and peak <= BYTES


def main() -> int:
    print("seed  first 5   last 5     rise  seconds  peak GiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        passed = [train(seed, Path(folder) / str(seed)) for seed in SEEDS]
    print("all bars met" if all(passed) else "below a bar")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
