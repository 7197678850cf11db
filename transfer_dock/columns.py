"""Between a stage's values and what the dock moves: one flat array per put and column, and places of rows in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash

from transfer_dock.errors import ColumnMismatch, InvalidRequest
from transfer_dock.jagged import Jagged, as_array, typed_array

NUMERIC = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64"),
)
MSGPACK = ("str", "object")


class Layout(NamedTuple):
    """How the rows of a column lie in its flat arrays: `jagged` rows are [length, *row_shape], others [*row_shape]."""

    jagged: bool
    row_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'variable-length' if self.jagged else 'fixed-size'} rows of shape {list(self.row_shape)}"


@dataclass(frozen=True)
class ColumnWrite:
    """One column of one put, as metadata: row i is [start[i], start[i] + length[i]) of a block of `nbytes` bytes."""

    layout: Layout
    start: np.ndarray
    length: np.ndarray
    digests: list[bytes]
    nbytes: int


@dataclass(frozen=True)
class ColumnRead:
    """One column of a batch, as metadata: row i is [start[i], start[i] + length[i]) of the block `refs[block[i]]`."""

    dtype: str
    layout: Layout
    refs: list[Any]
    block: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def select(self, rows: Sequence[int]) -> ColumnRead:
        """The same column for some rows, with only the blocks that they lie in."""
        index = np.asarray(rows, np.int64)
        used, block = np.unique(self.block[index], return_inverse=True)
        refs = [self.refs[position] for position in used]
        return replace(self, refs=refs, block=block, start=self.start[index], length=self.length[index])


def check_dtypes(columns: Mapping[str, str]) -> None:
    for name, dtype in columns.items():
        if dtype not in NUMERIC + MSGPACK:
            known = ", ".join(NUMERIC + MSGPACK)
            raise InvalidRequest(f"column {name!r} has the unsupported dtype {dtype!r}; supported: {known}")


def _pack(name: str, dtype: str, values: Any) -> Jagged:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ColumnMismatch(f"column {name!r} is {dtype!r} and takes a list with one value a sample")
    if dtype == "str" and (wrong := next((value for value in values if not isinstance(value, str)), None)) is not None:
        raise ColumnMismatch(f"column {name!r} takes strings, got {type(wrong).__name__}")
    try:
        packed = [msgpack.packb(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ColumnMismatch(f"column {name!r} takes what msgpack can carry: {error}") from None
    return Jagged(np.frombuffer(b"".join(packed), np.uint8), np.cumsum([0, *map(len, packed)]))


def _numeric(name: str, dtype: str, values: Any) -> Jagged | np.ndarray:
    if isinstance(values, (list, tuple)):
        scalars = all(np.ndim(value) == 0 for value in values)
        values = typed_array(values, dtype) if scalars else Jagged.from_rows(values, dtype)
    found = values if isinstance(values, Jagged) else as_array(values)
    flat = found.values if isinstance(found, Jagged) else found
    if flat.dtype != np.dtype(dtype):
        raise ColumnMismatch(f"column {name!r} is {dtype}, got {flat.dtype}; cast it before the put")
    if flat.ndim == 0:
        raise ColumnMismatch(f"column {name!r} got a single number; the first dimension is the samples")
    return found


def encode(name: str, dtype: str, values: Any, count: int) -> tuple[ColumnWrite, np.ndarray]:
    """The metadata and the flat, contiguous array of one column of a put with `count` keys.

    Raises: ColumnMismatch when the values do not have the column's dtype or `count` rows.
    """
    found = _pack(name, dtype, values) if dtype in MSGPACK else _numeric(name, dtype, values)
    if len(found) != count:
        raise ColumnMismatch(f"column {name!r} has {len(found)} rows for {count} keys")
    if isinstance(found, Jagged):
        flat = np.ascontiguousarray(found.values)
        layout, start, length = Layout(True, flat.shape[1:]), found.offsets[:-1], found.lengths
    else:
        flat = np.ascontiguousarray(found)
        layout, start, length = Layout(False, flat.shape[1:]), np.arange(count), np.ones(count, np.int64)
    ends = (start + length).tolist()
    digests = [xxhash.xxh3_128_digest(flat[low:end].data) for low, end in zip(start.tolist(), ends, strict=True)]
    return ColumnWrite(layout, start, length, digests, flat.nbytes), flat


def _gather(read: ColumnRead, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The rows one after the other: a view when they lie so in one block, otherwise one copy."""
    end = read.start + read.length
    breaks = np.flatnonzero((read.block[1:] != read.block[:-1]) | (read.start[1:] != end[:-1])) + 1
    firsts, lasts = np.append(0, breaks), np.append(breaks, len(read.block)) - 1
    runs = [blocks[read.block[first]][read.start[first] : end[last]] for first, last in zip(firsts, lasts, strict=True)]
    return runs[0] if len(runs) == 1 else np.concatenate(runs)


def decode(read: ColumnRead, fetch: Callable[[list[Any]], Sequence[np.ndarray]]) -> Jagged | np.ndarray | list[Any]:
    """The values of a column. `fetch` gives the flat arrays of its refs."""
    if len(read.block):
        flat = _gather(read, fetch(read.refs))
    else:
        flat = np.zeros((0, *read.layout.row_shape), "uint8" if read.dtype in MSGPACK else read.dtype)
    if not read.layout.jagged:
        return flat
    jagged = Jagged(flat, np.append(0, np.cumsum(read.length)))
    if read.dtype in MSGPACK:
        return [msgpack.unpackb(row, strict_map_key=False) for row in jagged.rows()]
    return jagged
