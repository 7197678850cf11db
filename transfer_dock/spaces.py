"""Free memory of every node's arena, with the extents that nobody needs but that can't be written yet."""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator, Sequence

from transfer_dock.errors import InvalidRequest
from transfer_dock.memory import Memory
from transfer_dock.space import Space

# How long an extent that a reader still looked at is left alone; seconds.
PARKED_SECONDS = 0.5
SMALLEST_ARENA = 1 << 20
PAGE = 4096


class Spaces:
    """One Space a node, each twice the dock's capacity (old bytes that are still looked at need room as well)."""

    def __init__(self, capacity_bytes: int) -> None:
        self.size = max(-(-2 * capacity_bytes // PAGE) * PAGE, SMALLEST_ARENA)
        self._spaces: dict[str, Space] = {}
        self._parked: dict[tuple[str, int], float] = {}
        self._ends: list[tuple[float, str, int]] = []
        self._pins: dict[int, set[tuple[str, int]]] = {}
        self._last_pin = 0
        # Not needed any more, but parked or pinned.
        self._kept: set[tuple[str, int]] = set()

    def take(self, memory: Memory) -> None:
        """Mark what a replayed book holds."""
        for (node, offset), extent in memory.extents.items():
            self._space(node).take(offset, extent.size)

    def _space(self, node: str) -> Space:
        if node not in self._spaces:
            self._spaces[node] = Space(self.size)
        return self._spaces[node]

    @contextlib.contextmanager
    def allocation(self, node: str, size: int) -> Iterator[int | None]:
        """The offset of a new extent, or None when there is none; given back when what follows raises."""
        offset = self._space(node).allocate(size)
        try:
            yield offset
        except BaseException:
            if offset is not None:
                self._spaces[node].free(offset)
            raise

    @contextlib.contextmanager
    def taken(self, places: Sequence[tuple[str, int, int]]) -> Iterator[None]:
        """Mark (node, offset, size) as used; given back when what follows raises. Raises: InvalidRequest."""
        done: list[tuple[str, int]] = []
        try:
            for node, offset, size in places:
                try:
                    self._space(node).take(offset, size)
                except ValueError as error:
                    raise InvalidRequest(f"node {node}: {error}") from None
                done.append((node, offset))
            yield
        except BaseException:
            for node, offset in done:
                self._spaces[node].free(offset)
            raise

    @contextlib.contextmanager
    def parking(self, node: str, offset: int, now: float) -> Iterator[None]:
        """What follows frees this extent, which is busy."""
        self._parked[node, offset] = now + PARKED_SECONDS
        try:
            yield
        except BaseException:
            del self._parked[node, offset]
            raise
        heapq.heappush(self._ends, (now + PARKED_SECONDS, node, offset))

    def free(self, node: str, offset: int) -> None:
        """The extent is not needed any more: free now, or when it is neither parked nor pinned."""
        place = node, offset
        if place in self._parked or any(place in pinned for pinned in self._pins.values()):
            self._kept.add(place)
        else:
            self._kept.discard(place)
            self._spaces[node].free(offset)

    def next_end(self) -> float | None:
        """When the first parked extent is free again."""
        return self._ends[0][0] if self._ends else None

    def settle(self, now: float) -> None:
        """Free what was parked until `now` or before."""
        while self._ends and self._ends[0][0] <= now:
            _, node, offset = heapq.heappop(self._ends)
            del self._parked[node, offset]
            self.free(node, offset)

    def pin(self, memory: Memory) -> int:
        """Keep what is needed now from being written over, until `unpin` of the returned number."""
        self._last_pin += 1
        self._pins[self._last_pin] = set(memory.extents)
        return self._last_pin

    def unpin(self, number: int) -> None:
        """Nothing happens when it was done before."""
        for node, offset in sorted(self._pins.pop(number, set()) & self._kept):
            self.free(node, offset)

    def status(self, memory: Memory) -> dict[str, dict[str, int]]:
        """By node: bytes in use (also parked and pinned ones), and the highest end of an extent ever."""
        return {
            node: {"used": space.used, "highest": memory.highest.get(node, 0)} for node, space in self._spaces.items()
        }
