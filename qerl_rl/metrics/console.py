"""The run on the console: progress inside a step, a line a step, a table at the end."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qerl_rl.metrics.summary import evaluations, format_duration, seconds_by_phase, summary_table

_LINE_EVERY_S = 5.0
_RECENT_STEPS = 5
_FILE_WIDTH = 500


@dataclass(frozen=True)
class _Phase:
    name: str
    start: float
    done: int = 0
    total: int = 0


class RunDisplay:
    """Shows a run to whoever waits for it. Use it as a context manager, so that the terminal is whole after an error.

    On a terminal: a live block with the phase, samples done, elapsed time, ETA and the last reward, and above it a line
    for each finished step. Otherwise (mode lines, or auto without a terminal): the line for each finished step, and
    inside a long phase one progress line every 5 s. quiet shows nothing.

    Args: steps, samples_per_step: of the run. mode: auto, lines or quiet. first_step: the first of this process, for a
        resumed run. stream: where to, standard output by default. clock: seconds, for tests.
    """

    def __init__(
        self,
        steps: int,
        samples_per_step: int,
        mode: str,
        *,
        first_step: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._samples_per_step, self._clock = steps, samples_per_step, clock
        stream = stream or sys.stdout
        is_terminal = stream.isatty()
        # A file takes any width; rich's default of 80 would fold the paths of the summary.
        self._console = Console(
            file=stream,
            width=None if is_terminal else _FILE_WIDTH,
            force_terminal=is_terminal,
            quiet=mode == "quiet",
            highlight=False,
        )
        self._is_live = mode == "auto" and is_terminal and not self._console.is_dumb_terminal
        # Held while a line is printed, but never in live mode: Live has a lock of its own and calls _block under it.
        self._line_lock = threading.Lock()
        self._live: Live | None = None
        self._ended = threading.Event()
        self._step, self._last, self._note = first_step, "", ""
        self._run_start = self._step_start = self._last_line = clock()
        self._phase = _Phase("", self._run_start)
        self._phase_seconds: dict[str, float] = {}
        self._durations: list[float] = []
        self._facts: dict[str, str] = {}

    def __enter__(self) -> RunDisplay:
        if self._is_live:
            self._live = Live(get_renderable=self._block, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            threading.Thread(target=self._tick, name="display", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live block off the terminal; no progress is shown afterwards."""
        self._ended.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the run does while the block lasts; phases may nest, the innermost is shown."""
        outer, inner = self._phase, _Phase(name, self._clock())
        self._phase = inner
        try:
            yield
        finally:
            self._phase = outer
            self._phase_seconds[name] = self._phase_seconds.get(name, 0.0) + self._clock() - inner.start

    def progress(self, done: int, total: int) -> None:
        """Samples the current phase has done, of how many."""
        self._phase = replace(self._phase, done=done, total=total)
        self.show_progress()

    def note(self, text: str) -> None:
        """A remark worth a line: the live block shows the last one, lines keep all."""
        self._note = text
        if not self._is_live:
            self._print(f"  {text}")

    def fact(self, label: str, text: str) -> None:
        """A remark about the whole run, which the summary repeats."""
        self._facts[label] = text
        self.note(f"{label}: {text}")

    def show_progress(self) -> None:
        """Print a progress line if the last line of any kind is 5 s old; the live block needs none."""
        if self._is_live or not self._phase.name:
            return
        with self._line_lock:
            if self._clock() - self._last_line >= _LINE_EVERY_S:
                self._print(self._progress_line())

    def finish_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A line with what came of the step; ETA is the mean of the last 5 steps times those left."""
        now = self._clock()
        self._durations.append(metrics.get("time/total_s") or now - self._step_start)
        self._last = " ".join(_figures(metrics)[0].split()[:2])
        self._step, self._step_start, self._note = step + 1, now, ""
        self._print(self._step_line(step, metrics))

    def summary(self, history: Sequence[Mapping[str, Any]], paths: Mapping[str, str | Path]) -> None:
        """The table that ends a run.

        Args: history: the metrics of all steps. paths: what was written, by what it is.
        """
        self.close()
        elapsed = self._clock() - self._run_start
        table = summary_table(
            history,
            paths,
            steps=self._steps,
            samples_per_step=self._samples_per_step,
            elapsed_s=elapsed,
            phase_seconds=self._phase_seconds,
            facts=self._facts,
        )
        self._console.print(table)

    def _print(self, line: str) -> None:
        self._last_line = self._clock()
        self._console.print(Text(line), soft_wrap=True)

    def _tick(self) -> None:
        while not self._ended.wait(1.0):
            self.show_progress()

    def _step_seconds(self) -> float:
        """What a step takes, from the last ones; 0 before the first has ended."""
        recent = self._durations[-_RECENT_STEPS:]
        return sum(recent) / len(recent) if recent else 0.0

    def _eta(self) -> str:
        if not self._durations:
            return "after the first step"
        left = (self._steps + 1 - self._step) * self._step_seconds()
        in_step = min(self._clock() - self._step_start, self._step_seconds())
        return format_duration(max(0.0, left - in_step))

    def _place(self) -> str:
        width = len(str(self._steps))
        return f"step {min(self._step, self._steps):>{width}}/{self._steps}"

    def _progress_line(self) -> str:
        phase, now = self._phase, self._clock()
        parts = [f"{phase.name} {now - phase.start:.0f} s"]
        if phase.total:
            parts.append(f"{phase.done}/{phase.total} samples")
        parts += [f"elapsed {format_duration(now - self._run_start)}", f"ETA {self._eta()}"]
        return f"{self._place()}  ... " + ", ".join(parts)

    def _step_line(self, step: int, metrics: Mapping[str, Any]) -> str:
        width = len(str(self._steps))
        phases = [f"{name} {spent:.1f}" for name, spent in seconds_by_phase([metrics]).items() if spent >= 0.05]
        parts = [
            f"step {step:>{width}}/{self._steps}",
            *_figures(metrics),
            f"{self._durations[-1]:.1f} s" + (f" ({', '.join(phases)})" if phases else ""),
        ]
        return "  ".join(parts + ([f"ETA {self._eta()}"] if step < self._steps else []))

    def _block(self) -> RenderableType:
        phase, now, step_seconds = self._phase, self._clock(), self._step_seconds()
        in_step = min(1.0, (now - self._step_start) / step_seconds) if step_seconds else 0.0
        run = Table.grid(padding=(0, 2))
        run.add_row(
            Text(self._place(), style="bold"),
            ProgressBar(total=float(self._steps), completed=min(self._steps, self._step - 1 + in_step), width=30),
            Text(f"elapsed {format_duration(now - self._run_start)}"),
            Text(f"ETA {self._eta()}"),
            Text(f"last {self._last}" if self._last else ""),
        )
        inner = Table.grid(padding=(0, 2))
        inner.add_row(
            Text(phase.name or "between phases", style="cyan"),
            ProgressBar(total=phase.total, completed=phase.done, width=30) if phase.total else Text(""),
            Text(f"{phase.done}/{phase.total} samples" if phase.total else ""),
            Text(f"{now - phase.start:.0f} s" if phase.name else "", style="dim"),
        )
        return Group(run, inner, Text(self._note, style="dim", overflow="ellipsis", no_wrap=True))


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    """What came of a step, the most telling figure first: of its rewards, or of its pairs where it had none."""
    evaluated = [f"{name} {_number(metrics, f'eval/{name}', '.3f')}" for name in evaluations(metrics)]
    if "preference/margin" in metrics:
        names = ("margin", "accuracy", "loss")
        return [f"{name} {_number(metrics, f'preference/{name}', '.3f')}" for name in names] + evaluated
    rewards = f"reward {_number(metrics, 'reward/mean', '.3f')} ± {_number(metrics, 'reward/std', '.3f')}"
    if "sampling/reward_mean" in metrics:
        rewards += f" (of all sampled {_number(metrics, 'sampling/reward_mean', '.3f')})"
    figures = [
        rewards,
        f"entropy {_number(metrics, 'entropy', '.3f')}",
        f"kl {_number(metrics, 'kl/reference', '.4f')}",
    ]
    if "critic/explained_variance" in metrics:
        figures.append(f"critic explains {_number(metrics, 'critic/explained_variance', '.2f')}")
    return figures + evaluated


def _number(metrics: Mapping[str, Any], name: str, form: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else format(value, form)
