"""Run a function on several real processes with one gloo world, and give back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(function: Callable[..., Any], rank: int, environment: dict[str, str], results: Any, args: tuple) -> None:
    os.environ.update(environment)
    try:
        results.put((rank, function(*args), None))
    except BaseException:  # noqa: BLE001 - whatever ended the rank must reach the test
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `world_size` fresh processes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set).

    `function` must be importable (module level); it initialises torch.distributed itself. Returns the results in rank
    order; raises RuntimeError with the traceback of the first rank that fails, or TimeoutError.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = []
    for rank in range(world_size):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # The child imports torch before _rank_main runs, so the thread count must be in the environment it inherits.
        os.environ.update(OMP_NUM_THREADS="1")
        process = context.Process(target=_rank_main, args=(function, rank, environment, results, args), daemon=True)
        process.start()
        processes.append(process)
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            try:
                rank, value, error = results.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(
                    f"{function.__name__}: {world_size - len(found)} ranks gave nothing in {timeout_s} s"
                ) from None
            if error:
                raise RuntimeError(f"rank {rank} of {function.__name__} failed:\n{error}")
            found[rank] = value
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [found[rank] for rank in range(world_size)]


_store: Any = None
_worlds = 0


def fresh_world() -> None:
    """A new gloo default group in this process of `run_ranks`; collective.

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
    dist.init_process_group("gloo", store=dist.PrefixStore(str(_worlds), _store), rank=rank, world_size=world_size)
