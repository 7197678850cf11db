"""The table that ends a run: what was gained, where the time went, what was written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.table import Table
from rich.text import Text

_COMPARED_STEPS = 5
_BAR_WIDTH = 24
_SHOWN_SHARE = 0.005


def format_duration(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def format_bytes(count: float) -> str:
    """Binary units, as the memory of a machine is counted: 3221225472 -> 3.00 GiB."""
    unit = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**unit:.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def seconds_by_phase(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The sums over steps of every time/<phase>_s but the total."""
    seconds: dict[str, float] = {}
    for metrics in history:
        for name, spent in metrics.items():
            if name.startswith("time/") and name.endswith("_s") and name != "time/total_s":
                phase = name.removeprefix("time/").removesuffix("_s")
                seconds[phase] = seconds.get(phase, 0.0) + (spent or 0.0)
    return seconds


def evaluations(metrics: Mapping[str, Any]) -> list[str]:
    """What an evaluation measured of the answers, by the names behind eval/: pass@1, avg@n, maj@n, ..."""
    return [name.removeprefix("eval/") for name in metrics if name.startswith("eval/") and "@" in name]


def summary_table(
    history: Sequence[Mapping[str, Any]],
    paths: Mapping[str, str | Path],
    *,
    steps: int,
    samples_per_step: int,
    elapsed_s: float,
    phase_seconds: Mapping[str, float],
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Table:
    """The table of a run of `steps` planned steps.

    Args: history: the metrics of the finished steps. paths: what was written, by what it is. phase_seconds: of every
        phase of the run; those no step counts as time/<phase>_s (start, export) get rows of their own. facts: what
        else is to be said of the run, by label.
    """
    table = Table(title="Run summary", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(
        "steps", f"{len(history)} of {steps} in {format_duration(elapsed_s)}, {samples_per_step} samples each"
    )
    for label, fact in facts.items():
        table.add_row(label, fact)
    held_out = sorted({name for metrics in history for name in evaluations(metrics)})
    for label, name, digits in (
        ("reward", "reward/mean", 3),
        ("of all sampled", "sampling/reward_mean", 3),
        ("margin of pairs", "preference/margin", 3),
        ("accuracy of pairs", "preference/accuracy", 3),
        *((f"held-out {name}", f"eval/{name}", 3) for name in held_out),
        ("entropy", "entropy", 3),
        ("KL to reference", "kl/reference", 4),
        ("KL engine to trainer", "rollout_vs_train/k3_kl", 4),
        ("critic explains", "critic/explained_variance", 3),
        ("updates that merging kept", "swap/update_survival", 3),
        ("canary of the swap", "swap/canary", 3),
    ):
        change = _first_and_last(history, name, digits)
        if change:
            table.add_row(label, change)
    for label, name in (("rollout", "tokens_per_s/rollout"), ("train", "tokens_per_s/train")):
        speeds = _values(history, name)
        if speeds:
            table.add_row(f"{label} speed", f"{statistics.median(speeds):,.0f} tokens/s, median of the steps")
    seconds = seconds_by_phase(history)
    seconds |= {phase: spent for phase, spent in phase_seconds.items() if phase not in seconds}
    if seconds:
        table.add_row("where the time went", _time_shares(seconds, elapsed_s))
    peaks = _values(history, "memory/peak_bytes")
    if peaks:
        table.add_row("peak memory", format_bytes(max(peaks)))
    if paths:
        table.add_section()
    for label, path in paths.items():
        table.add_row(label, Text(str(path)))
    return table


def _first_and_last(history: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    values = _values(history, name)
    if not values:
        return ""
    count = min(_COMPARED_STEPS, max(1, len(values) // 2))
    first, last = statistics.fmean(values[:count]), statistics.fmean(values[-count:])
    steps = "step" if count == 1 else f"mean of {count} steps"
    return f"first {first:.{digits}f}, last {last:.{digits}f} ({last - first:+.{digits}f}; {steps})"


def _time_shares(seconds: Mapping[str, float], elapsed_s: float) -> Table:
    # A resumed run also shows the steps of the processes before it, which its own clock has not seen.
    whole = max(elapsed_s, sum(seconds.values())) or 1.0
    shares = Table.grid(padding=(0, 2))
    for column in ("left", "right", "right", "left"):
        shares.add_column(justify=column)  # type: ignore[arg-type]
    rest = whole - sum(seconds.values())
    rows = [*sorted(seconds.items(), key=lambda item: -item[1]), ("not in a phase", rest)]
    for phase, spent in rows:
        if spent >= _SHOWN_SHARE * whole:
            bar = "█" * round(_BAR_WIDTH * spent / whole)
            shares.add_row(phase, f"{spent:.1f} s", f"{100 * spent / whole:.0f} %", Text(bar, style="cyan"))
    return shares


def _values(history: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [metrics[name] for metrics in history if metrics.get(name) is not None]
