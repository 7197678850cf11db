"""The nodes of a dock, as its controller sees them: where each keeps payload, and which processes end there."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_dock import wire
from transfer_dock.arena import Arena, arena_folder
from transfer_dock.columns import ColumnRead, flat_rows
from transfer_dock.spaces import Spaces
from transfer_dock.watch import process_end

NAMESPACE = "transfer_dock"


class Home(NamedTuple):
    """The dock's name, and node id and arena file of the node where it was created."""

    name: str
    node: str
    path: str

    @property
    def journal(self) -> str:
        """The controller's journal, beside the arena."""
        return os.path.splitext(self.path)[0] + ".journal"

    def remove(self) -> None:
        """Delete both, if this machine has them; who looks at payload keeps what it sees."""
        for path in (self.path, self.journal):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def new_arena_path(name: str, node: str, capacity_bytes: int) -> str:
    """A file for the payload of dock `name` on this machine."""
    return os.path.join(arena_folder(capacity_bytes), f"transfer-dock-{name}-{node[:12]}.arena")


class NodeAgent:
    """Serves a node's payload to other nodes and watches its processes; a Ray actor, on nodes that need one."""

    def __init__(self, name: str, node: str, capacity_bytes: int, path: str | None) -> None:
        self.path = path or new_arena_path(name, node, capacity_bytes)
        try:
            self.arena = Arena.create(self.path, Spaces(capacity_bytes).size)
        except FileExistsError:
            self.arena = Arena(self.path)

    async def arena_path(self) -> str:
        return self.path

    async def rows(self, message: bytes) -> np.ndarray:
        """The rows of a column whose places are all here, one after the other; Ray carries them to the caller."""
        read = ColumnRead.from_data(wire.unpack(message))
        pins = {place.extent: self.arena.pin(place.extent, place.size) for place in read.places}
        return flat_rows(read, lambda places: [pins[at.extent].view(at.offset, at.nbytes) for at in places])

    async def process_end(self, pid: int, started: float) -> None:
        """Returns when that process of this node has ended."""
        await process_end(pid, started)

    async def remove(self) -> None:
        """Delete the arena; who still looks at it keeps what it sees."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


class Nodes:
    """Arena files by node id in `paths`, and agents where they are needed: on other nodes than the controller's `home`,
    and there too once another node reads from it."""

    def __init__(self, home: Home, capacity_bytes: int, paths: Mapping[str, str]) -> None:
        self.home, self.capacity_bytes, self.paths = home, capacity_bytes, {home.node: home.path, **paths}
        # A controller that restarts starts new agents: the old ones end with the process that owned them.
        self._generation = uuid.uuid4().hex[:8]
        self._agents: dict[str, Any] = {}

    def agent(self, node: str) -> Any:
        """The agent of a node, started if there is none."""
        if node not in self._agents:
            options: dict[str, Any] = {
                "num_cpus": 0,
                "name": self._name_of(node),
                "namespace": NAMESPACE,
                "max_restarts": -1,
                "max_concurrency": 10_000,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            }
            actor = ray.remote(NodeAgent).options(**options)
            self._agents[node] = actor.remote(self.home.name, node, self.capacity_bytes, self.paths.get(node))
        return self._agents[node]

    def _name_of(self, node: str) -> str:
        return f"{self.home.name}-{self._generation}-{node}"

    async def start(self, node: str) -> str:
        """The arena file of a node, made if there is none."""
        if node not in self.paths:
            self.paths[node] = await self.agent(node).arena_path.remote()
        return self.paths[node]

    def agent_name(self, node: str) -> str:
        """The Ray name of a node's agent, in NAMESPACE."""
        self.agent(node)
        return self._name_of(node)

    async def process_end(self, node: str, pid: int, started: float) -> None:
        """Returns when a process has ended, or its node has."""
        if node == self.home.node:
            return await process_end(pid, started)
        while True:
            try:
                return await self.agent(node).process_end.remote(pid, started)
            except ActorUnavailableError:
                # The agent itself was killed and restarts; Ray holds the next call until it is there.
                await asyncio.sleep(0)
            except RayActorError:
                return None

    async def close(self) -> None:
        """Delete the dock's files on all nodes."""
        self.home.remove()
        for node in self.paths.keys() - {self.home.node}:
            with contextlib.suppress(RayActorError):
                await self.agent(node).remove.remote()
