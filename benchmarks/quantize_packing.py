"""Quantizing and packing experts: our throughput over compressed-tensors' own, on the same tensors.

Both get the weights of 8 experts and give what a checkpoint holds, bit for bit the same (checked). The library works a
matrix at a time, as it does for a model of Linear modules: scales from each group's extremes, then its compressor. Each
has an untimed run first (the library compiles its FP4 rounding then), then they take turns on the same threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.figures import Figure
from qerl_rl.quant.formats import Format, get_format
from tests.quant.library import library_compress

EXPERTS, ROWS, COLUMNS = 8, 1024, 1024
REPEATS = 3
THREADS = 2
BARS = {"w8a8": 2.0, "w4a16": 2.0, "w4a8": 2.0, "nvfp4": 5.0, "mxfp4": 5.0}


def measure(repeats: int = REPEATS) -> list[Figure]:
    """Ratios of throughputs, a format at a time, for experts in bfloat16 and in float32; prints both throughputs."""
    torch.set_num_threads(THREADS)
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator) * 0.02
    figures = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, bar in BARS.items():
            ratio = _ratio(get_format(name), experts.to(dtype), repeats)
            figures.append(Figure(f"quantize and pack {name} from {str(dtype)[6:]}", ratio, bar, at_least=True))
    return figures


def _ratio(format: Format, experts: torch.Tensor, repeats: int) -> float:
    def ours() -> list[dict[str, torch.Tensor]]:
        parts = format.quantize(experts)
        return [format.stored({suffix: part[i] for suffix, part in parts.items()}) for i in range(len(experts))]

    def library() -> list[dict[str, torch.Tensor]]:
        return [library_compress(format, expert) for expert in experts]

    for mine, theirs in zip(ours(), library(), strict=True):
        for suffix, tensor in mine.items():
            if not torch.equal(tensor.view(torch.uint8), theirs[f"weight{suffix}"].view(torch.uint8)):
                raise AssertionError(f"{format.name}{suffix} differs from the library's")
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("library", library)):
            seconds[name].append(_seconds(run))
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "library"))
    million = experts.numel() / 1e6
    print(f"  {format.name} {experts.dtype}: {million / mine:.0f} M weights/s, the library {million / theirs:.0f}")
    return theirs / mine


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
