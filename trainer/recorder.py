"""What a run leaves behind and shows: metrics, samples, plots, the console."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np

from qerl_rl.config.loader import to_yaml
from qerl_rl.config.schema import Config
from qerl_rl.data.pairs import Pair
from qerl_rl.metrics.console import RunDisplay
from qerl_rl.metrics.plot import plot_run
from qerl_rl.metrics.tracker import Tracker, keep_before
from qerl_rl.quant.requantize import Survival
from qerl_rl.reshard.ledger import SwapReport
from trainer.resume import checkpoints_of
from transfer_dock import Batch

SURVIVAL_FLOOR = 0.8
"""Less than this of an update in the engine's merged weights is worth a warning."""
TIMED = ("rollout", "swap", "reward", "log_probs", "update")


class RunRecorder:
    """Times the phases of each step, and writes and shows what came of them.

    Args: config: the run. display: shows it. first_step: what an earlier process wrote of it and later steps is cut.
    `memory` gives the peak bytes of all processes, once a step; until the
    workers are there, that of this process.
    """

    def __init__(self, config: Config, display: RunDisplay, *, first_step: int = 1) -> None:
        self.config, self.display = config, display
        self.folder = Path(config.run.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        self.checkpoints, self.export = checkpoints_of(config), self.folder / "export"
        self.tracker = Tracker(self.folder, config.track, first_step=first_step)
        self.memory: Callable[[], int] = own_peak_bytes
        self._seconds: dict[str, float] = {}
        self._swapped: dict[str, float] = {}
        self._swaps = self.folder / "swaps.jsonl"
        keep_before(self._swaps, first_step)
        self._first_step, self._step = first_step, 0

    @contextmanager
    def step(self, number: int) -> Iterator[dict[str, float]]:
        """One step; what is put into the yielded dictionary is logged with the times when it ends."""
        self._step, self._seconds, self._swapped = number, {}, {}
        begin = perf_counter()
        record: dict[str, float] = {}
        yield record
        total = perf_counter() - begin
        metrics = {**record, **self._swapped, **self._times(total), **self._throughput(record)}
        metrics["memory/peak_bytes"] = float(self.memory())
        self.tracker.log(number, metrics)
        self.display.finish_step(number, metrics)

    def _times(self, total: float) -> dict[str, float]:
        seconds = dict.fromkeys(TIMED, 0.0) | self._seconds
        return {f"time/{name}_s": value for name, value in seconds.items()} | {"time/total_s": total}

    def _throughput(self, record: dict[str, float]) -> dict[str, float]:
        phases = {"rollout": "rollout", "train": "update"}
        # What was sampled in the background knows its own speed: the step may not have waited for it at all.
        return {
            f"tokens_per_s/{name}": record[f"{name}/tokens"] / self._seconds[phase]
            for name, phase in phases.items()
            if f"{name}/tokens" in record and f"tokens_per_s/{name}" not in record
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside under `name`, added up over the step, and show it."""
        begin = perf_counter()
        with self.display.phase(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - begin

    def progress(self, done: int, total: int) -> None:
        """Samples done in the phase that runs."""
        self.display.progress(done, total)

    def swap(self, reports: list[SwapReport]) -> None:
        """Append the ledger of one phase change, a line a rank, to swaps.jsonl; the first step's is shown too."""
        with self._swaps.open("a", encoding="utf-8") as file:
            for rank, report in enumerate(reports):
                row = {"step": self._step, "rank": rank, **dataclasses.asdict(report), "ledger": report.line()}
                file.write(json.dumps(row) + "\n")
        if self._step == self._first_step:
            self.display.note(f"rank 0: {reports[0].line()}")
        self._count_survival([report.survival for report in reports if report.survival is not None])
        self._count_transfer(reports)

    def _count_transfer(self, reports: list[SwapReport]) -> None:
        """Bytes that went between ranks, and what the canary found where it is asked in every step."""
        traffic = [report.traffic for report in reports if report.traffic is not None]
        if traffic:
            self._swapped["swap/sent_bytes"] = float(sum(part.sent_bytes for part in traffic))
        found = [report.canary for report in reports if report.canary is not None]
        # One of the first swap of a process would be in a resumed run's metrics and not in those of a straight one.
        if found and self.config.swap.canary == "always":
            self._swapped["swap/canary"] = max(found)

    def _count_survival(self, parts: list[Survival]) -> None:
        """How much of the adapters came into merged weights, over all ranks; a warning where it is little."""
        if not parts:
            return
        total = Survival()
        for part in parts:
            total.add(part)
        self._swapped["swap/update_survival"] = total.ratio
        if total.ratio < SURVIVAL_FLOOR:
            fix = "set lora.merge_rounding to stochastic"
            if self.config.lora.merge_rounding == "stochastic":
                fix = "set lora.in_rollout to adapter, or use a format of finer steps (w8a8)"
            self.display.note(f"swap/update_survival is {total.ratio:.2f}: merged weights lost what was learned; {fix}")

    def samples(self, step: int, batch: Batch, advantages: np.ndarray) -> None:
        """Write the first rows of a scored step to samples.jsonl."""
        columns = batch.columns
        for row in range(min(self.config.track.samples_per_step, len(batch.keys))):
            self.tracker.sample(
                step,
                {
                    "group": batch.keys[row].group,
                    "index": batch.keys[row].index,
                    "prompt": columns["prompt_texts"][row],
                    "response": columns["response_texts"][row],
                    "answer": columns["answers"][row],
                    "reward": float(columns["rewards"][row]),
                    "advantage": float(advantages[row]),
                },
            )

    def pairs(self, step: int, pairs: Sequence[Pair]) -> None:
        """Write the first pairs of a step to samples.jsonl."""
        for group, pair in enumerate(pairs[: self.config.track.samples_per_step]):
            fields = {"group": group, "prompt": pair.text, "chosen": pair.answer, "rejected": pair.rejected_text}
            self.tracker.sample(step, fields)

    def finish(self) -> None:
        """Draw the curves and show the table that ends a run."""
        self.tracker.close()
        paths = {
            "metrics": self.tracker.metrics_path,
            "swap ledger": self._swaps,
            "tensorboard": self.tracker.tensorboard_path,
            "samples": self.tracker.samples_path,
            "checkpoint": self.checkpoints,
            "HF export": self.export / "hf",
            "adapter": self.export / "adapter",
        }
        if self.config.track.plot:
            name = "preference.png" if self.config.algorithm.name == "dpo" else "reward.png"
            paths["curves"] = plot_run(self.tracker.metrics_path, self.folder / name)
        self.display.summary(self.tracker.history, {name: path for name, path in paths.items() if Path(path).exists()})


def own_peak_bytes() -> int:
    """The most memory this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
