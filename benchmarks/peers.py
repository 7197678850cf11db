"""The ways to hand columns from one process to another that `benchmarks.transfer_dock` compares, on the same data.

Each is used as its authors do. The dock: put, get. Ray: `ray.put` and `ray.get` of a dict of the same tensors, which
Ray pickles; `ray_numpy`: of numpy arrays, which `ray.get` maps without a copy, its best case. TransferQueue:
`kv_batch_put` and `kv_batch_get` of jagged nested tensors, as in its own scripts/performance_test/perftest.py.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensordict import TensorDict

from transfer_dock import Batch, Jagged, SampleKey, TransferDock

SAMPLES_PER_GROUP = 8
# Layers and experts a token of Qwen3-30B-A3B: routing, kept for replay in training, is most of what a sample weighs.
ROUTED = (48, 8)
COLUMNS = {
    "prompts": "int32",
    "responses": "int32",
    "rollout_log_probs": "float32",
    "old_log_probs": "float32",
    "reference_log_probs": "float32",
    "advantages": "float32",
    "routed_experts": "uint8",
}
# TransferQueue's default, and its best on 2 cores: 0.52, 0.57 and 0.55 GB/s with 1, 2 and 4 units at 300 MB, 0.38, 0.41
# and 0.37 at 2 GB.
STORAGE_UNITS = 2


def make_columns(nbytes: int, seed: int = 0) -> dict[str, Jagged]:
    """Columns of RL samples with log-normal lengths, about `nbytes` together (whole samples: a little less)."""
    random = np.random.default_rng(seed)
    most = nbytes // 20_000 + 64
    prompts = np.clip(random.lognormal(np.log(300), 0.6, most), 16, 4096).astype(np.int64)
    responses = np.clip(random.lognormal(np.log(1500), 0.7, most), 16, 16384).astype(np.int64)
    weights = 4 * prompts + 20 * responses + int(np.prod(ROUTED)) * (prompts + responses)
    count = int(np.searchsorted(np.cumsum(weights), nbytes, side="right"))
    prompts, responses = prompts[:count], responses[:count]
    lengths = dict.fromkeys(COLUMNS, responses) | {"prompts": prompts, "routed_experts": prompts + responses}

    def values(name: str, dtype: str, total: int) -> np.ndarray:
        if dtype == "float32":
            return random.standard_normal(total, np.float32)
        if dtype == "uint8":
            return random.integers(0, 128, (total, *ROUTED), np.uint8)
        return random.integers(0, 151_936, total, np.int32)

    return {
        name: Jagged(values(name, dtype, int(lengths[name].sum())), np.append(0, np.cumsum(lengths[name])))
        for name, dtype in COLUMNS.items()
    }


def checksum(values: np.ndarray) -> int:
    """Sum over every byte of `values`, eight at a time as uint64 (it wraps), the odd bytes at the end by themselves."""
    flat = values.reshape(-1).view(np.uint8)
    whole = len(flat) // 8 * 8
    return (int(flat[:whole].view(np.uint64).sum()) + int(flat[whole:].sum())) % 2**64


def as_nested(columns: dict[str, Jagged]) -> dict[str, torch.Tensor]:
    """Jagged nested tensors on the same memory."""
    from_numpy, from_jagged = torch.from_numpy, torch.nested.nested_tensor_from_jagged
    return {
        name: from_jagged(from_numpy(column.values), from_numpy(column.offsets)) for name, column in columns.items()
    }


class Read(NamedTuple):
    """What a reader got: flat arrays by column, and what it must hold on to meanwhile."""

    values: dict[str, np.ndarray]
    held: Any


class DockPeer:
    """Ours. A trip is a step of the dock, closed when it is over."""

    def __init__(self, dock: TransferDock) -> None:
        self.dock = dock

    def prepare(self, columns: dict[str, Jagged]) -> dict[str, Jagged]:
        return columns

    def put(self, columns: dict[str, Jagged], trip: int) -> tuple[int, int]:
        count = len(columns["prompts"])
        self.dock.put(columns, [SampleKey(trip, *divmod(index, SAMPLES_PER_GROUP)) for index in range(count)])
        return trip, count

    def get(self, handle: tuple[int, int]) -> Read:
        trip, count = handle
        batch = self.dock.get("reader", count, step=trip)
        return Read({name: batch.columns[name].values for name in COLUMNS}, batch)

    def end(self, handle: tuple[int, int], batch: Batch) -> None:
        self.dock.ack(batch)
        self.dock.close_step(handle[0], carry_unfinished=False)


class RayNumpyPeer:
    """`ray.put` and `ray.get` of numpy arrays. Dropping the reference frees the object."""

    def prepare(self, columns: dict[str, Jagged]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {name: (column.values, column.offsets) for name, column in columns.items()}

    def put(self, columns: dict[str, tuple[np.ndarray, np.ndarray]], trip: int) -> list[Any]:
        return [ray.put(columns)]

    def get(self, handle: list[Any]) -> Read:
        columns = ray.get(handle[0])
        return Read({name: values for name, (values, _) in columns.items()}, columns)

    def end(self, handle: list[Any], held: Any) -> None:
        pass


class RayPeer(RayNumpyPeer):
    """The same with jagged nested tensors (plain tensors and a TensorDict are not faster)."""

    def prepare(self, columns: dict[str, Jagged]) -> dict[str, torch.Tensor]:
        return as_nested(columns)

    def get(self, handle: list[Any]) -> Read:
        columns = ray.get(handle[0])
        return Read({name: column.values().numpy() for name, column in columns.items()}, columns)


class TransferQueuePeer:
    """TransferQueue on its SimpleStorage. The first process to come starts controller and storage, others connect."""

    def __init__(self) -> None:
        storage = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": STORAGE_UNITS}}
        transfer_queue.init(OmegaConf.create({"backend": storage}))

    def prepare(self, columns: dict[str, Jagged]) -> TensorDict:
        return TensorDict(as_nested(columns), batch_size=[len(columns["prompts"])])

    def put(self, columns: TensorDict, trip: int) -> Any:
        keys = [f"{trip}-{index}" for index in range(columns.batch_size[0])]
        return transfer_queue.kv_batch_put(keys=keys, partition_id=f"trip-{trip}", fields=columns)

    def get(self, handle: Any) -> Read:
        columns = transfer_queue.kv_batch_get_by_meta(handle)
        return Read({name: columns[name].values().numpy() for name in COLUMNS}, columns)

    def end(self, handle: Any, held: Any) -> None:
        transfer_queue.kv_clear(keys=handle.keys, partition_id=handle.partition_id)


class Stage:
    """One process of the comparison, producer or reader, with all peers in it."""

    def __init__(self) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        self.peers: dict[str, Any] = {
            "ray": RayPeer(),
            "ray_numpy": RayNumpyPeer(),
            "transferqueue": TransferQueuePeer(),
        }
        self.inputs: dict[str, Any] = {}
        self.held: Any = None

    def attach(self, dock: TransferDock) -> None:
        """Use this dock from now on."""
        self.peers["ours"] = DockPeer(dock)

    def load(self, nbytes: int) -> tuple[int, dict[str, int]]:
        """Make the data of a case, in the form that each peer takes. Returns its bytes and the expected sums."""
        self.inputs = {}
        columns = make_columns(nbytes)
        self.inputs = {name: peer.prepare(columns) for name, peer in self.peers.items()}
        sums = {name: checksum(column.values) for name, column in columns.items()}
        return sum(column.values.nbytes for column in columns.values()), sums

    def put(self, peer: str, trip: int) -> Any:
        """Store the data. Returns what the reader needs."""
        return self.peers[peer].put(self.inputs[peer], trip)

    def read(self, peer: str, handle: Any) -> dict[str, int]:
        """Fetch the data and sum every byte; what was fetched is held until `end`, so that freeing it is not timed."""
        read = self.peers[peer].get(handle)
        self.held = read.held
        return {name: checksum(values) for name, values in read.values.items()}

    def end(self, peer: str, handle: Any) -> None:
        """Drop what `read` fetched, and the stored data with it."""
        held, self.held = self.held, None
        self.peers[peer].end(handle, held)

    def copied(self) -> tuple[int, int, int, int]:
        """The dock's counts in this process: bytes put, copied meanwhile, got, copied meanwhile."""
        dock = self.peers["ours"].dock
        return dock.bytes_put, dock.bytes_copied_put, dock.bytes_got, dock.bytes_copied_get
