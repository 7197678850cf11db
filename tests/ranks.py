"""Run functions on several real processes of one gloo world, and give back what each returned."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(environment: dict[str, str], inbox: Any, outbox: Any) -> None:
    os.environ.update(environment)
    # Importing the engines makes millions of objects that stay; collecting as often as usual costs a quarter of it.
    gc.set_threshold(100_000)
    rank = int(environment["RANK"])
    for function, args in iter(inbox.get, None):
        try:
            outbox.put((rank, function(*args), None))
        except BaseException:  # noqa: BLE001 - whatever ended the function must reach the test
            outbox.put((rank, None, traceback.format_exc()))


class RankPool:
    """`world_size` processes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set) that run one function after the other.

    They stay between calls, since importing torch and Megatron costs more than most of what the tests run; a function
    finds what the one before it left in the process (`fresh_world` starts over). A rank that fails ends the pool, and
    the next call starts another. Use it as a context manager, or close it.
    Between calls they are stopped: gloo's threads, hundreds after many layouts, would take a core otherwise.
    start_method: spawn, or forkserver for processes in which vLLM is imported already.
    """

    def __init__(self, world_size: int, start_method: str = "spawn") -> None:
        self._world_size, self._start_method = world_size, start_method
        self._processes: list[Any] = []
        self._inboxes: list[Any] = []
        self._outbox: Any = None

    def __call__(self, function: Callable[..., Any], *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """What `function(*args)` returned, in rank order; `function` must be importable (module level).

        Raises: RuntimeError with the traceback of the first rank that fails; TimeoutError.
        """
        if not self._processes:
            self._start()
        self._signal(signal.SIGCONT)
        for inbox in self._inboxes:
            inbox.put((function, args))
        found: dict[int, Any] = {}
        while len(found) < self._world_size:
            try:
                rank, value, error = self._outbox.get(timeout=timeout_s)
            except queue.Empty:
                self._kill()
                missing = sorted({*range(self._world_size)} - found.keys())
                raise TimeoutError(f"ranks {missing} gave nothing from {function.__name__} in {timeout_s} s") from None
            if error:
                self._kill()
                raise RuntimeError(f"rank {rank} of {function.__name__} failed:\n{error}")
            found[rank] = value
        self._signal(signal.SIGSTOP)
        return [found[rank] for rank in range(self._world_size)]

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(self._start_method)
        if self._start_method == "forkserver":
            context.set_forkserver_preload(["tests.vllm_imported"])
        # The children import torch before they see their environment, so the thread count must be inherited.
        os.environ["OMP_NUM_THREADS"] = "1"
        shared = {
            "WORLD_SIZE": str(self._world_size),
            "LOCAL_WORLD_SIZE": str(self._world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._outbox = context.Queue()
        for rank in range(self._world_size):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            inbox = context.Queue()
            process = context.Process(target=_serve, args=(environment, inbox, self._outbox), daemon=True)
            process.start()
            self._processes.append(process)
            self._inboxes.append(inbox)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            os.kill(process.pid, number)

    def close(self) -> None:
        """Let the processes end by themselves; one that does not within 30 s is killed."""
        self._signal(signal.SIGCONT)
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=30)
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._inboxes = [], []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """`RankPool` for one call, in processes that nothing ran in before."""
    with RankPool(world_size) as pool:
        return pool(function, *args, timeout_s=timeout_s)


def run_engines(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`run_ranks` in processes that have imported vLLM, and nothing else has run in; it spares each five seconds."""
    with RankPool(world_size, "forkserver") as pool:
        return pool(function, *args)


_store: Any = None
_worlds = 0


def fresh_world(backend: str = "gloo") -> None:
    """A new default group in this process of a `RankPool`; collective.

    It closes the groups of the last one: each gloo group keeps threads that wake a hundred times a second, so a process
    that tries layout after layout would drown in them.
    """
    global _store, _worlds
    import torch.distributed as dist
    from megatron.core import parallel_state

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if _store is None:
        _store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, rank == 0)
    if dist.is_initialized():
        dist.barrier()
        parallel_state.destroy_model_parallel()
        # Megatron forgets to forget these, and a rank that was a first stage once would take itself for one.
        parallel_state._POSITION_EMBEDDING_GLOBAL_RANKS = None
        parallel_state._EMBEDDING_GLOBAL_RANKS = None
        dist.destroy_process_group()
    _worlds += 1
    dist.init_process_group(backend, store=dist.PrefixStore(str(_worlds), _store), rank=rank, world_size=world_size)
