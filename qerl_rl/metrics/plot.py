"""The picture of a run over its steps: reward and entropy, or what it learned from pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qerl_rl.metrics.tracker import read_metrics

_REWARD_COLOUR, _ENTROPY_COLOUR, _TEXT_COLOUR = "#1f5fa8", "#c05a1c", "#333333"
_CHOSEN_COLOUR, _REJECTED_COLOUR = "#3a8f4d", "#b03a48"
_AVERAGED_STEPS = 5


def plot_run(metrics_path: str | Path, image_path: str | Path, *, title: str = "") -> Path:
    """Draw metrics.jsonl as a PNG: mean reward with a band of one standard deviation of the samples; below it, entropy.

    The band ends at reward/min and reward/max where a step has them. Missing or null values leave gaps. A run from
    pairs shows what its policy gained on the reference in chosen and rejected responses; below it, the share of pairs
    that it ranks right.
    Returns: image_path. Raises: ValueError when the file has no step.
    """
    history = read_metrics(metrics_path)
    if not history:
        raise ValueError(f"{metrics_path} has no step to draw")
    steps = np.array([entry["step"] for entry in history])
    figure = Figure(figsize=(8.0, 5.6), dpi=130, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    if any("preference/margin" in entry for entry in history):
        _draw_pairs(upper, lower, steps, history)
    else:
        _draw_samples(upper, lower, steps, history)
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_TEXT_COLOUR)
        axes.margins(x=0.02)
    if title:
        upper.set_title(title, loc="left", fontsize=12, color=_TEXT_COLOUR)
    figure.align_ylabels()
    figure.savefig(image_path)
    return Path(image_path)


def _draw_samples(upper: Axes, lower: Axes, steps: np.ndarray, history: list[dict[str, Any]]) -> None:
    mean, std = _column(history, "reward/mean"), _column(history, "reward/std")
    band = (
        np.fmax(mean - std, _column(history, "reward/min")),
        np.fmin(mean + std, _column(history, "reward/max")),
    )
    _draw_reward(upper, steps, mean, band)
    _draw_line(lower, steps, _column(history, "entropy"), _ENTROPY_COLOUR, label="")
    lower.set_ylabel("entropy\n(nats per token)")


def _draw_pairs(upper: Axes, lower: Axes, steps: np.ndarray, history: list[dict[str, Any]]) -> None:
    lines = {"reward_chosen": _CHOSEN_COLOUR, "margin": _REWARD_COLOUR, "reward_rejected": _REJECTED_COLOUR}
    for name, colour in lines.items():
        values = _column(history, f"preference/{name}")
        _draw_line(upper, steps, values, colour, label=name.removeprefix("reward_"))
    upper.set_ylabel("beta x log ratio\nto the reference")
    upper.legend(frameon=False, loc="best", fontsize=9, ncols=len(lines))
    _draw_line(lower, steps, _column(history, "preference/accuracy"), _ENTROPY_COLOUR, label="")
    lower.set_ylabel("accuracy\nof pairs")


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
