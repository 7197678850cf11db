"""A dock over two nodes of a Ray cluster: payload stays where it was put until somebody elsewhere reads it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_dock import Jagged, SampleKey, TransferDock

COLUMNS = {"responses": "int32", "experts": "uint8", "answers": "str", "rewards": "float32"}
CONSUMERS = {"reward": ["responses", "answers"], "train": ["responses", "experts", "rewards"]}
KEYS = [SampleKey(1, group, index) for group in range(6) for index in range(2)]
Until = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Ids of the driver's node and of the other one."""
    small = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(**small)
    ray.init(address=cluster.address, log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()
    yield [here, *(node["NodeID"] for node in ray.nodes() if node["NodeID"] != here)]
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def dock(nodes: list[str]) -> Iterator[TransferDock]:
    dock = TransferDock.create(
        columns=COLUMNS, consumers=CONSUMERS, samples_per_group=2, capacity_bytes=1 << 24, timeout=60.0
    )
    yield dock
    dock.close()


@ray.remote(num_cpus=0)
class Stage:
    def pid(self) -> int:
        return os.getpid()

    def put(self, dock: TransferDock, keys: list[SampleKey]) -> None:
        dock.put(columns_of(keys), keys)

    def sums(self, dock: TransferDock, consumer: str, count: int) -> dict[str, Any]:
        batch = dock.get(consumer, count)
        found = {name: total(batch.columns[name]) for name in batch.columns}
        dock.ack(batch)
        return found

    def hold(self, dock: TransferDock, count: int) -> int:
        self.batch = dock.get("reward", count)
        return len(self.batch)


def on(node: str) -> Any:
    return Stage.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()


def columns_of(keys: list[SampleKey]) -> dict[str, Any]:
    lengths = [1000 + 100 * key.group + key.index for key in keys]
    return {
        "responses": [np.full(length, key.group, np.int32) for key, length in zip(keys, lengths, strict=True)],
        "experts": Jagged.from_rows([np.full((length, 3, 2), length % 251, np.uint8) for length in lengths]),
        "answers": [f"answer {length}" for length in lengths],
        "rewards": np.array(lengths, np.float32),
    }


def total(values: Any) -> Any:
    if isinstance(values, list):
        return values
    return int((values.values if isinstance(values, Jagged) else values).astype(np.int64).sum())


def expected(keys: list[SampleKey], columns: list[str]) -> dict[str, Any]:
    found = columns_of(keys)
    rows = found["responses"]
    return {name: total(Jagged.from_rows(rows) if name == "responses" else found[name]) for name in columns}


def test_either_node_reads_what_both_have_put(nodes: list[str], dock: TransferDock) -> None:
    here, there = (on(node) for node in nodes)
    # Every other group: a batch alternates between the nodes.
    ray.get(here.put.remote(dock, [key for key in KEYS if key.group % 2]))
    ray.get(there.put.remote(dock, [key for key in KEYS if not key.group % 2]))
    assert set(dock.status()["nodes"]) == set(nodes)
    for consumer, stage in (("train", here), ("reward", there)):
        assert ray.get(stage.sums.remote(dock, consumer, len(KEYS))) == expected(KEYS, CONSUMERS[consumer])
    assert dock.status()["bytes_held"] == 0


def test_a_batch_leased_here_is_read_there(nodes: list[str], dock: TransferDock) -> None:
    ray.get(on(nodes[1]).put.remote(dock, KEYS))
    batch = dock.get("train", len(KEYS))
    first, second = batch.split([range(4), range(4, 12)])
    read = ray.remote(num_cpus=0)(lambda part: {name: total(part.columns[name]) for name in part.columns})
    there = read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[1], soft=False))
    assert ray.get(there.remote(second)) == expected(list(second.keys), CONSUMERS["train"])
    assert {name: total(first.columns[name]) for name in first.columns} == expected(
        list(first.keys), CONSUMERS["train"]
    )


def test_a_process_that_dies_on_the_other_node_gives_back_its_lease(nodes: list[str], dock: TransferDock) -> None:
    dock.put(columns_of(KEYS), KEYS)
    stage = on(nodes[1])
    assert ray.get(stage.hold.remote(dock, len(KEYS))) == len(KEYS)
    ray.kill(stage)
    assert list(dock.get("reward", len(KEYS)).keys) == KEYS


def test_killed_agents_and_a_killed_controller_are_back_for_the_next_read(
    nodes: list[str], dock: TransferDock, until: Until
) -> None:
    there = on(nodes[1])
    ray.get(there.put.remote(dock, KEYS))
    batch = dock.get("train", len(KEYS))
    assert total(batch.columns["responses"]) == expected(KEYS, ["responses"])["responses"]
    for name in ("NodeAgent", "Controller"):
        for pid in processes_of(name):
            os.kill(pid, signal.SIGKILL)
        column = {"NodeAgent": "experts", "Controller": "rewards"}[name]
        assert total(batch.columns[column]) == expected(KEYS, [column])[column]
    dock.ack(batch)
    assert ray.get(there.sums.remote(dock, "reward", len(KEYS))) == expected(KEYS, CONSUMERS["reward"])


def processes_of(actor_class: str) -> list[int]:
    from ray.util.state import list_actors

    found = list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", actor_class)])
    assert found, f"no {actor_class} runs"
    return [actor.pid for actor in found]
