"""What does a swap of all weights cost? `python -m benchmarks.reshard` measures it on two real ranks.

A MoE of 510 MB in bfloat16 goes from each train layout to each rollout layout, in each format. Of every case one row:
- moved/bound: bytes that ranks sent each other over those that they needed and did not hold; of all, and of experts.
- swap/copy: seconds of the transfer over those of a plain copy of all bytes that it writes (torch's copy_ of each of
  the engine's tensors). Both write into memory that was written before, on both ranks at once, and take turns.
- peak: resident memory while train tensors leave and rollout tensors come (these into fresh memory), over the larger
  of the two shards and two buckets of 16 MiB.
- bytes/bf16: what moved over what moves in bfloat16.
- bytes/gather, time/gather: at train EP2, over every rank gathering full bfloat16 tensors (bucket by bucket through
  the same exchange, into memory that was written before) and slicing them. Where each rank has an engine of its own it
  needs everything: there the two differ by the format alone, and nothing is judged.

Then the times of planning for large models (`benchmarks.reshard_plan`). Exits 1 below a bar.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from itertools import product

from benchmarks import reshard_plan
from benchmarks.figures import Figure
from benchmarks.reshard_cases import BUCKET_BYTES, FORMATS, RANKS, ROLLOUT, TRAIN, Case, Found, join, measure
from tests.ranks import RankPool

BYTES_BARS = {"int8": 0.52, "int4": 0.28}

Row = dict[str, float]


def measured(cases: Iterable[Case]) -> dict[Case, list[Found]]:
    """Each case on two processes that do nothing else."""
    # Freed memory goes back at once: glibc would else keep ever larger blocks, and a peak would say little.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 << 10)
    found: dict[Case, list[Found]] = {}
    with RankPool(RANKS) as pool:
        pool(join)
        for case in cases:
            found[case] = pool(measure, case)
    return found


def row_of(found: list[Found], in_bfloat16: list[Found]) -> Row:
    def total(of: Callable[[Found], float], ranks: list[Found] = found) -> float:
        return sum(map(of, ranks))

    row = {
        "moved/bound": _over(total(lambda f: f.moved), total(lambda f: f.lower_bound)),
        "experts": _over(total(lambda f: f.experts_moved), total(lambda f: f.experts_lower_bound)),
        "swap/copy": found[0].swap_s / found[0].copy_s,
        "peak": max(f.peak / (f.shard + 2 * BUCKET_BYTES) for f in found),
    }
    plain = total(lambda f: f.moved, in_bfloat16)
    if plain and found is not in_bfloat16:
        row["bytes/bf16"] = total(lambda f: f.moved) / plain
    if found[0].gather_s:
        row["bytes/gather"] = total(lambda f: f.moved) / total(lambda f: f.gathered)
        row["time/gather"] = found[0].swap_s / found[0].gather_s
    return row


def _over(moved: float, bound: float) -> float:
    """1 where nothing had to move, and nothing did."""
    return moved / bound if bound else 1.0 + moved


def judged(rows: dict[Case, Row]) -> list[Figure]:
    """The worst case of each figure, with its bar."""

    def worst(title: str, key: str, bar: float, which: Callable[[Case], bool] = lambda case: True) -> Figure:
        value, case = max((row[key], str(case)) for case, row in rows.items() if key in row and which(case))
        return Figure(f"{title} ({case})", value, bar, at_least=False)

    figures = [
        worst("bytes moved / bound", "moved/bound", 1.05),
        worst("of experts", "experts", 1.00),
        worst("swap / copy", "swap/copy", 3.0),
        worst("peak memory", "peak", 1.10),
    ]
    for format, bar in BYTES_BARS.items():
        figures.append(worst(f"{format} / bf16 bytes", "bytes/bf16", bar, lambda case, of=format: case.format == of))
    for title, key in (("bytes / gathering's", "bytes/gather"), ("time / gathering's", "time/gather")):
        figures.append(worst(title, key, 0.5, lambda case: case.rollout != "2 engines"))
    return figures


def main() -> int:
    cases = [Case(*names) for names in product(TRAIN, ROLLOUT, FORMATS)]
    found = measured(cases)
    rows: dict[Case, Row] = {}
    for case in cases:
        rows[case] = row_of(found[case], found[Case(case.train, case.rollout, "bf16")])
        swap = f"{found[case][0].swap_s * 1e3:.0f} ms"
        print(f"{case!s:<44} {swap:>8}  " + "  ".join(f"{name} {value:.2f}" for name, value in rows[case].items()))
    figures = judged(rows) + reshard_plan.measure()
    print("\n".join(map(str, figures)))
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
