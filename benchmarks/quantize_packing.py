"""Quantizing and packing experts: our throughput over compressed-tensors' own, on the same tensors.

Both get the weights of 8 experts and give what a checkpoint holds, bit for bit the same (checked). The library works a
matrix at a time, as it does for a model of Linear modules: scales from each group's extremes, then its compressor. Each
has an untimed run first (the library compiles its FP4 rounding then), then they take turns on the same threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.figures import Figure
from benchmarks.turns import median_seconds
from qerl_rl.quant.formats import get_format
from tests.quant.library import library_compress

EXPERTS, ROWS, COLUMNS = 8, 1024, 1024
TURNS, CALLS = 5, 3
THREADS = 2
BARS = {"w8a8": 2.0, "w4a16": 2.0, "w4a8": 2.0, "nvfp4": 5.0, "mxfp4": 5.0}


def measure(turns: int = TURNS) -> list[Figure]:
    """Ratios of throughputs, a format at a time, for experts in bfloat16 and in float32; prints both throughputs."""
    figures = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, bar in BARS.items():
            ratio = _ratio(name, dtype, turns)
            figures.append(Figure(f"quantize and pack {name} from {str(dtype)[6:]}", ratio, bar, at_least=True))
    return figures


def _ratio(name: str, dtype: torch.dtype, turns: int) -> float:
    mine, theirs = _ours(name, dtype)(), _library(name, dtype)()
    for parts, expected in zip(mine, theirs, strict=True):
        for suffix, tensor in parts.items():
            if not torch.equal(tensor.view(torch.uint8), expected[f"weight{suffix}"].view(torch.uint8)):
                raise AssertionError(f"{name}{suffix} differs from the library's")
    contenders = {"ours": partial(_ours, name, dtype), "library": partial(_library, name, dtype)}
    seconds = median_seconds(contenders, turns=turns, calls=CALLS)
    million = EXPERTS * ROWS * COLUMNS / 1e6
    rates = {who: million / value for who, value in seconds.items()}
    print(f"  {name} {dtype}: {rates['ours']:.0f} M weights/s, the library {rates['library']:.0f}")
    return seconds["library"] / seconds["ours"]


def _experts(dtype: torch.dtype) -> torch.Tensor:
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator) * 0.02).to(dtype)


def _ours(name: str, dtype: torch.dtype) -> Callable[[], list[dict[str, torch.Tensor]]]:
    format, experts = get_format(name), _experts(dtype)

    def run() -> list[dict[str, torch.Tensor]]:
        parts = format.quantize(experts)
        return [format.stored({suffix: part[i] for suffix, part in parts.items()}) for i in range(len(experts))]

    return run


def _library(name: str, dtype: torch.dtype) -> Callable[[], list[dict[str, torch.Tensor]]]:
    format, experts = get_format(name), _experts(dtype)
    return lambda: [library_compress(format, expert) for expert in experts]
