"""Processes that stay: importing torch and Megatron costs more than most of what the tests run."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

from tests.ranks import free_port


def _serve(rank: int, environment: dict[str, str], inbox: Any, outbox: Any) -> None:
    os.environ.update(environment)
    for function, args in iter(inbox.get, None):
        try:
            outbox.put((rank, function(*args), None))
        except BaseException:  # noqa: BLE001 - whatever ended the function must reach the test
            outbox.put((rank, None, traceback.format_exc()))


class RankPool:
    """`world_size` processes of one gloo world that run one function after the other, all of them each.

    As `tests.ranks.run_ranks`, but a function finds the process group and Megatron of the one before it: see
    `tests.train.models.start_engine`. A rank that fails ends the pool; the next call starts another.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._processes: list[Any] = []
        self._inboxes: list[Any] = []
        self._outbox: Any = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """What `function(*args)` returned on each rank. Raises: RuntimeError with a rank's traceback, TimeoutError."""
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        found: dict[int, Any] = {}
        while len(found) < self._world_size:
            try:
                rank, value, error = self._outbox.get(timeout=timeout_s)
            except queue.Empty:
                self.close()
                missing = sorted({*range(self._world_size)} - found.keys())
                raise TimeoutError(f"ranks {missing} gave nothing from {function.__name__} in {timeout_s} s") from None
            if error:
                self.close()
                raise RuntimeError(f"rank {rank} of {function.__name__} failed:\n{error}")
            found[rank] = value
        return [found[rank] for rank in range(self._world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # The children import torch before they see their environment, so the thread count must be inherited.
        os.environ["OMP_NUM_THREADS"] = "1"
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
        self._outbox = context.Queue()
        for rank in range(self._world_size):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self._world_size)}
            inbox = context.Queue()
            process = context.Process(target=_serve, args=(rank, environment, inbox, self._outbox), daemon=True)
            process.start()
            self._processes.append(process)
            self._inboxes.append(inbox)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._inboxes = [], []
