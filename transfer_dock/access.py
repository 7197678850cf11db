"""How a process gets at the payload of a dock: in place on its own node, through an agent and Ray from another."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError

from transfer_dock import wire
from transfer_dock.arena import Arena, Pin
from transfer_dock.calls import Caller, ask
from transfer_dock.columns import ColumnRead, Place, flat_rows
from transfer_dock.errors import PayloadLost
from transfer_dock.nodes import NAMESPACE, Home
from transfer_dock.watch import identity

# Seconds between tries to reach the agent of another node while it restarts.
AGENT_RETRY = 0.2


class Traffic:
    """Payload bytes that this process moved for one dock, and how many of them were copied on the way."""

    def __init__(self) -> None:
        self.put = self.copied_put = self.got = self.copied_get = 0


_arenas: dict[str, Arena] = {}
_traffic: dict[str, Traffic] = {}
_lock = threading.Lock()


def adopt(path: str, arena: Arena) -> None:
    """Keep the arena that this process made: a file that nobody has open would be swept up as a dead dock's."""
    with _lock:
        _arenas[path] = arena


def _open(path: str) -> Arena:
    """One mapping a process and arena, for all handles on the dock."""
    with _lock:
        if path not in _arenas:
            # Docks that were closed elsewhere: as long as they are mapped, their memory is not free.
            for gone in [other for other in _arenas if not os.path.exists(other)]:
                _arenas.pop(gone).close()
            _arenas[path] = Arena(path)
        return _arenas[path]


class Access:
    """This process's way to the payload of one dock; pickled as who the controller is and where home is."""

    def __init__(self, caller: Caller, home: Home) -> None:
        self.caller, self.home = caller, home
        self._paths = {home.node: home.path}

    def __reduce__(self) -> tuple[Any, ...]:
        return Access, (self.caller, self.home)

    @property
    def node(self) -> str:
        """The Ray id of this process's node."""
        return ray.get_runtime_context().get_node_id()

    @property
    def holder(self) -> list[Any]:
        """This process, for leases and reservations that end with it: node, process id, start time."""
        return [self.node, *identity()]

    @property
    def traffic(self) -> Traffic:
        with _lock:
            return _traffic.setdefault(self.home.name, Traffic())

    def arena(self) -> Arena:
        """The arena of this process's node, made if this is the node's first put."""
        node = self.node
        if node not in self._paths:
            self._paths[node] = self.caller.run(ask("attach", node))[0]
        return _open(self._paths[node])

    def pin(self, reads: Iterable[ColumnRead]) -> dict[int, Pin]:
        """Hold the extents of this node that columns lie in; by offset. Raises: PayloadLost."""
        node = self.node
        extents = {place.extent: place.size for read in reads for place in read.places if place.node == node}
        if not extents:
            return {}
        arena = self.arena()
        return {extent: arena.pin(extent, size) for extent, size in extents.items()}

    def is_local(self, read: ColumnRead) -> bool:
        node = self.node
        return all(place.node == node for place in read.places)

    def rows(self, read: ColumnRead, pins: dict[int, Pin], timeout: float) -> np.ndarray:
        """The rows of a column one after the other. Raises: PayloadLost."""
        if not self.is_local(read):
            read = self._fetched(read, timeout)
        flat = flat_rows(read, lambda places: [_bytes(place, pins) for place in places])
        traffic = self.traffic
        traffic.got += flat.nbytes
        traffic.copied_get += flat.nbytes if flat.flags.owndata else 0
        return flat

    def _fetched(self, read: ColumnRead, timeout: float) -> ColumnRead:
        """The same column with what lies on other nodes brought here: one array a node."""
        here, start, block = self.node, read.start.copy(), read.block.copy()
        places: list[Any] = list(read.places)
        nodes = np.array([place.node for place in read.places])[read.block]
        for node in sorted(set(nodes.tolist()) - {here}):
            rows = np.flatnonzero(nodes == node)
            part = read.select(rows)
            data = self._from_agent(node, part, timeout)
            self.traffic.copied_get += data.nbytes
            block[rows], start[rows] = len(places), np.cumsum(part.length) - part.length
            places.append(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        found = ColumnRead(read.dtype, read.layout, places, block, start, read.length)
        return found.select(np.arange(len(block)))

    def _from_agent(self, node: str, part: ColumnRead, timeout: float) -> np.ndarray:
        end = time.monotonic() + timeout
        while True:
            try:
                agent = ray.get_actor(self.caller.run(ask("attach", node))[1], NAMESPACE)
                return ray.get(agent.rows.remote(wire.pack(part.as_data())), timeout=max(end - time.monotonic(), 0.0))
            except (RayActorError, ValueError) as error:
                # The agent, or the controller that owns it, was killed: it is back in a moment unless its node is gone.
                if time.monotonic() > end:
                    raise PayloadLost(f"node {node} does not answer: {str(error).splitlines()[0]}") from None
                time.sleep(AGENT_RETRY)
            except RayError as error:
                raise PayloadLost(f"reading from node {node} failed: {str(error).splitlines()[0]}") from error

    def forget(self) -> None:
        """Unmap the dock's arenas in this process; views that are alive stay good."""
        with _lock:
            for path in self._paths.values():
                if (arena := _arenas.pop(path, None)) is not None:
                    arena.close()


def _bytes(place: Place | np.ndarray, pins: dict[int, Pin]) -> np.ndarray:
    return place if isinstance(place, np.ndarray) else pins[place.extent].view(place.offset, place.nbytes)
