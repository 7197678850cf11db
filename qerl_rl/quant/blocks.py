"""Element-wise work over a large tensor, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

from qerl_rl.platform.threads import on_threads

BLOCK = 1 << 20
"""Elements at a time: few enough for the processor's cache, enough that threads need not wait for Python's lock."""


def in_blocks(work: Callable[[slice], None], rows: int, width: int) -> None:
    """Call `work` for slices that make up `rows` rows of `width` elements, on as many threads as torch may use."""
    at_once = max(BLOCK // width, 1)

    def work_through(blocks: list[slice]) -> None:
        for block in blocks:
            work(block)

    on_threads(work_through, [slice(start, start + at_once) for start in range(0, rows, at_once)])
