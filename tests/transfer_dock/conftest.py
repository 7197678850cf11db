"""One small Ray for all dock tests, and a dock on it for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from transfer_dock import TransferDock

COLUMNS = {
    "prompts": "int32",
    "responses": "int32",
    "log_probs": "float32",
    "experts": "uint8",
    "rewards": "float32",
    "answers": "str",
    "extras": "object",
}
CONSUMERS = {
    "reward": ["prompts", "responses", "answers"],
    "train": ["responses", "log_probs", "rewards"],
    "everything": list(COLUMNS),
}


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_dock(ray_cluster: None) -> Iterator[Callable[..., TransferDock]]:
    docks = []

    def make(**changes: Any) -> TransferDock:
        options = {
            "columns": COLUMNS,
            "consumers": CONSUMERS,
            "samples_per_group": 4,
            "capacity_bytes": 1 << 26,
            "timeout": 30.0,
        }
        docks.append(TransferDock.create(**(options | changes)))
        return docks[-1]

    yield make
    for dock in docks:
        dock.close()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait for another process to get somewhere; fails after a minute."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "it never came to that"
            time.sleep(0.02)

    return wait
