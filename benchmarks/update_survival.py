"""How much of an update comes through merging and rounding: `python -m benchmarks.update_survival` (a minute).

A weight [1024, 1024] of each format, changes of rank 16 whose root mean square is a given part of half a step (of the
root mean square distance of neighbouring numbers, where the grid is uneven), 16 draws of the rounding.
"""

from __future__ import annotations

import statistics

import torch

from qerl_rl.quant.formats import Format, get_format
from qerl_rl.quant.requantize import Shard, Survival, merged_parts
from qerl_rl.quant.rounding import Rounding

FORMATS = ("w8a8", "w4a16", "w4a8", "nvfp4", "mxfp4", "mxfp8")
SIZES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
WIDTH, RANK, DRAWS = 1024, 16, 16


def half_step(format: Format, weight: torch.Tensor) -> float:
    """Root mean square over the weights of half the distance between their neighbours on the grid."""
    parts = format.quantize(weight)
    steps = format.steps(parts)[..., None]
    scaled = (weight.unflatten(-1, (steps.shape[-2], -1)) / steps).clamp(float(format.grid[0]), float(format.grid[-1]))
    above = torch.searchsorted(format.grid, scaled.contiguous()).clamp(1, len(format.grid) - 1)
    gaps = (format.grid[above] - format.grid[above - 1]) * steps
    return float(gaps.square().mean().sqrt()) / 2


def survivals(format: Format, size: float, stochastic: bool, draws: int) -> list[float]:
    """swap/update_survival of each draw."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    a, b = torch.randn(RANK, WIDTH, generator=generator), torch.randn(WIDTH, RANK, generator=generator)
    b *= size * half_step(format, weight) / RANK**0.5
    parts, found = format.quantize(weight), []
    for draw in range(draws):
        survival = Survival()
        merged_parts(format, parts, a, b, Rounding(stochastic, 1, draw), Shard("weight"), survival)
        found.append(survival.ratio)
    return found


def main() -> None:
    print("| format | rounding | " + " | ".join(f"{size:g} of half a step" for size in SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))
    for name in FORMATS:
        format = get_format(name)
        drawn = [survivals(format, size, True, DRAWS) for size in SIZES]
        cells = [f"{statistics.mean(some):.2f} ± {statistics.stdev(some):.2f}" for some in drawn]
        print(f"| {name} | stochastic | " + " | ".join(cells) + " |", flush=True)
        nearest = [survivals(format, size, False, 1)[0] for size in SIZES]
        print(f"| {name} | nearest | " + " | ".join(f"{one:.2f}" for one in nearest) + " |", flush=True)


if __name__ == "__main__":
    main()
