"""Contenders that take turns, each in a process of its own.

In one process the threads of the one that has just run, which wait a while for more work, would slow the next.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Prepare = Callable[[], Callable[[], object]]
"""Called in the contender's process; gives what is timed. A module's function, or a partial of one."""


def median_seconds(contenders: Mapping[str, Prepare], *, turns: int, calls: int) -> dict[str, float]:
    """Median over `turns` of the mean time of `calls` calls, by contender; two calls before are not counted."""
    context = multiprocessing.get_context("spawn")
    running: dict[str, tuple[Any, Any]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for name, prepare in contenders.items():
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(prepare, there), daemon=True)
        process.start()
        there.close()
        running[name] = (process, here)
    for _, connection in running.values():
        connection.recv()
    for _ in range(turns):
        for name, (_, connection) in running.items():
            connection.send(calls)
            seconds[name].append(connection.recv())
    for process, connection in running.values():
        connection.close()
        process.join()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _serve(prepare: Prepare, connection: Any) -> None:
    run = prepare()
    for _ in range(2):
        run()
    connection.send("ready")
    try:
        while calls := connection.recv():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            connection.send((time.perf_counter() - start) / calls)
    except EOFError:
        # All turns are taken.
        pass
