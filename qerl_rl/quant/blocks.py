"""Element-wise work over a large tensor, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

BLOCK = 1 << 15
"""Elements at a time. What is computed of so few stays in the processor's cache, and torch does not split it over its
threads, which would have to wait for each other after every operation."""


def in_blocks(work: Callable[[slice], None], rows: int, width: int) -> None:
    """Call `work` for slices that make up `rows` rows of `width` elements, on as many threads as torch may use."""
    at_once = max(BLOCK // width, 1)
    blocks = [slice(start, start + at_once) for start in range(0, rows, at_once)]
    threads = min(torch.get_num_threads(), len(blocks))
    shares = [blocks[first::threads] for first in range(threads)]

    def work_through(share: list[slice]) -> None:
        for block in share:
            work(block)

    if threads <= 1:
        work_through(blocks)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work_through, shares))
