"""The picture of a run: reward and entropy over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qerl_rl.metrics.tracker import read_metrics

_REWARD_COLOUR, _ENTROPY_COLOUR, _TEXT_COLOUR = "#1f5fa8", "#c05a1c", "#333333"
_AVERAGED_STEPS = 5


def plot_run(metrics_path: str | Path, image_path: str | Path, *, title: str = "") -> Path:
    """Draw metrics.jsonl as a PNG: mean reward with a band of one standard deviation of the samples; below it, entropy.

    The band ends at reward/min and reward/max where a step has them. Missing or null values leave gaps.
    Returns: image_path. Raises: ValueError when the file has no step.
    """
    history = read_metrics(metrics_path)
    if not history:
        raise ValueError(f"{metrics_path} has no step to draw")
    steps = np.array([entry["step"] for entry in history])
    figure = Figure(figsize=(8.0, 5.6), dpi=130, layout="constrained")
    reward_axes, entropy_axes = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    mean, std = _column(history, "reward/mean"), _column(history, "reward/std")
    band = (
        np.fmax(mean - std, _column(history, "reward/min")),
        np.fmin(mean + std, _column(history, "reward/max")),
    )
    _draw_reward(reward_axes, steps, mean, band)
    _draw_line(entropy_axes, steps, _column(history, "entropy"), _ENTROPY_COLOUR, label="")
    entropy_axes.set_ylabel("entropy\n(nats per token)")
    entropy_axes.set_xlabel("step")
    entropy_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (reward_axes, entropy_axes):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_TEXT_COLOUR)
        axes.margins(x=0.02)
    if title:
        reward_axes.set_title(title, loc="left", fontsize=12, color=_TEXT_COLOUR)
    figure.align_ylabels()
    figure.savefig(image_path)
    return Path(image_path)


def _draw_reward(axes: Axes, steps: np.ndarray, mean: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> None:
    axes.fill_between(steps, *band, color=_REWARD_COLOUR, alpha=0.12, linewidth=0, label="± 1 std of the samples")
    averaged = len(steps) >= 3 * _AVERAGED_STEPS
    _draw_line(axes, steps, mean, _REWARD_COLOUR, label="mean of a step", faint=averaged)
    if averaged:
        label = f"mean of the last {_AVERAGED_STEPS} steps"
        axes.plot(steps, _trailing_mean(mean), color=_REWARD_COLOUR, linewidth=2.2, label=label)
    axes.set_ylabel("reward")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], frameon=False, loc="upper left", fontsize=9, ncols=len(handles))
    # Room for the legend above the band.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, *, label: str, faint: bool = False
) -> None:
    width, alpha = (1.0, 0.55) if faint else (1.8, 1.0)
    # A point between two gaps has no line to show it.
    marker = "o" if len(steps) <= 40 or np.isnan(values).any() else ""
    axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker=marker, markersize=3.2, label=label)


def _trailing_mean(values: np.ndarray) -> np.ndarray:
    windows = [values[max(0, end - _AVERAGED_STEPS) : end] for end in range(1, len(values) + 1)]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def _column(history: list[dict[str, Any]], name: str) -> np.ndarray:
    values = [entry.get(name) for entry in history]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
