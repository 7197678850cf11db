"""Which bytes of an arena are in use. Pure: the same calls in the same order give the same places."""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np

ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to what an extent of that size takes, at least ALIGNMENT."""
    return max(ALIGNMENT, nbytes + -nbytes % ALIGNMENT)


class Space:
    """The addresses 0 to `size` of one arena; extents begin and end at multiples of 64 bytes.

    The lowest place that fits is taken, because memory that was touched before is an order of magnitude faster than
    fresh memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size - size % ALIGNMENT
        self.used = 0
        self.highest = 0
        self._extents: dict[int, int] = {}
        # Holes by rising address. Plain arrays: an insertion is one memmove, and numpy finds the first that fits.
        self._starts = array("q")
        self._sizes = array("q")
        if self.size > 0:
            self._starts.append(0)
            self._sizes.append(self.size)

    def allocate(self, nbytes: int) -> int | None:
        """The lowest offset with `nbytes` free bytes behind it, which are then in use; None when there is none."""
        if nbytes < 0:
            raise ValueError(f"an extent of {nbytes} bytes")
        needed = aligned(nbytes)
        fits = np.frombuffer(self._sizes, np.int64) >= needed
        if not len(fits) or not fits[hole := int(fits.argmax())]:
            return None
        offset = self._starts[hole]
        self._use(hole, offset, needed)
        return offset

    def take(self, offset: int, nbytes: int) -> None:
        """Mark one given extent as used, as a replayed journal says.

        Raises: ValueError when it is not aligned, not inside the space, or any byte of it is in use.
        """
        needed = aligned(nbytes)
        if nbytes < 0 or offset < 0 or offset % ALIGNMENT or offset + needed > self.size:
            raise ValueError(f"no extent of {nbytes} bytes can lie at {offset} of a space of {self.size}")
        hole = bisect_right(self._starts, offset) - 1
        if hole < 0 or offset + needed > self._starts[hole] + self._sizes[hole]:
            raise ValueError(f"bytes {offset} to {offset + needed} are partly in use")
        self._use(hole, offset, needed)

    def free(self, offset: int) -> None:
        """Give back the extent at `offset`.

        Raises: KeyError when none begins there.
        """
        if offset not in self._extents:
            raise KeyError(f"no extent begins at {offset}")
        nbytes = self._extents.pop(offset)
        self.used -= nbytes
        after = bisect_right(self._starts, offset)
        joins_before = after > 0 and self._starts[after - 1] + self._sizes[after - 1] == offset
        joins_after = after < len(self._starts) and self._starts[after] == offset + nbytes
        if joins_before and joins_after:
            self._sizes[after - 1] += nbytes + self._sizes[after]
            self._remove_hole(after)
        elif joins_before:
            self._sizes[after - 1] += nbytes
        elif joins_after:
            self._starts[after] = offset
            self._sizes[after] += nbytes
        else:
            self._starts.insert(after, offset)
            self._sizes.insert(after, nbytes)

    def extents(self) -> list[tuple[int, int]]:
        """(offset, bytes taken) of all that is in use, by rising offset."""
        return sorted(self._extents.items())

    def _use(self, hole: int, offset: int, nbytes: int) -> None:
        """Cut an extent out of a hole that holds it."""
        start, size = self._starts[hole], self._sizes[hole]
        before, behind = offset - start, start + size - offset - nbytes
        if before and behind:
            self._sizes[hole] = before
            self._starts.insert(hole + 1, offset + nbytes)
            self._sizes.insert(hole + 1, behind)
        elif before:
            self._sizes[hole] = before
        elif behind:
            self._starts[hole] = offset + nbytes
            self._sizes[hole] = behind
        else:
            self._remove_hole(hole)
        self._extents[offset] = nbytes
        self.used += nbytes
        self.highest = max(self.highest, offset + nbytes)

    def _remove_hole(self, hole: int) -> None:
        del self._starts[hole], self._sizes[hole]
