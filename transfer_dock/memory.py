"""Which extents of the nodes' arenas hold payload that somebody still needs."""

from __future__ import annotations

from transfer_dock.records import Block, Extent, Sample


class Memory:
    """Extents by (node, offset), the end of the highest one ever on each node, and the bytes of live blocks."""

    def __init__(self) -> None:
        self.extents: dict[tuple[str, int], Extent] = {}
        self.highest: dict[str, int] = {}
        self.bytes_held = 0
        self._freed: list[tuple[str, int]] = []

    def hold(self, node: str, offset: int, size: int) -> Extent:
        extent = self.extents[node, offset] = Extent(node, offset, size)
        self.highest[node] = max(self.highest.get(node, 0), offset + size)
        return extent

    def free(self, extent: Extent) -> None:
        del self.extents[extent.node, extent.offset]
        self._freed.append((extent.node, extent.offset))

    def take_freed(self) -> list[tuple[str, int]]:
        """The extents (node, offset) that became free since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def need(self, block: Block, samples: int) -> None:
        """This many unfinished samples lie in a new block."""
        block.live = samples
        if samples:
            self.bytes_held += block.nbytes
            block.extent.live += 1

    def forget(self, sample: Sample) -> None:
        """Nobody will read the sample's values any more."""
        for block, _, _ in sample.places.values():
            block.live -= 1
            if not block.live:
                self.bytes_held -= block.nbytes
                block.extent.live -= 1
                if not block.extent.live:
                    self.free(block.extent)
        sample.places.clear()
