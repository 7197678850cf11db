"""Independent pieces of work on as many threads as torch may compute with, each piece on one of them.

torch shares every single operation out between its threads, which costs a tenth of a millisecond on some machines:
more than a small operation takes. Whole pieces need no such hand-over, and what a piece works on stays in one cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""By process (a forked one has no threads of its parent's) and number of threads."""


def on_threads(work: Callable[[list[Item]], None], items: Iterable[Item]) -> None:
    """`work` on all items: one call with all of them, or one call a thread with its share, of about equal length.

    Gradients are not recorded in there. Calls run at the same time: they must write to different places.
    """
    every, count = list(items), torch.get_num_threads()
    if count == 1 or len(every) < 2:
        work(every)
        return
    shares = [every[first::count] for first in range(min(count, len(every)))]
    # Whoever waits gets what a thread raised.
    for _ in _pool(count).map(_without_gradients(work), shares):
        pass


def _without_gradients(work: Callable[[list[Item]], None]) -> Callable[[list[Item]], None]:
    def run(share: list[Item]) -> None:
        # Each thread has a switch of its own, which is on at first.
        with torch.no_grad():
            work(share)

    return run


def _pool(count: int) -> ThreadPoolExecutor:
    key = (os.getpid(), count)
    if key not in _pools:
        pool, all_there = ThreadPoolExecutor(count, thread_name_prefix="pieces"), Barrier(count)

        def compute_alone() -> None:
            # A thread takes over the number of all at its first question, which must not come after its own.
            torch.get_num_threads()
            torch.set_num_threads(1)
            # No thread takes a second of these calls before each has had its own.
            all_there.wait()

        for call in [pool.submit(compute_alone) for _ in range(count)]:
            call.result()
        # The number is also what threads to come begin with.
        torch.set_num_threads(count)
        _pools[key] = pool
    return _pools[key]
