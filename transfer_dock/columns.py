"""Between a stage's values and what the dock moves: arrays laid one after the other, and places of rows among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash

from transfer_dock.errors import ColumnMismatch, InvalidRequest
from transfer_dock.jagged import TORCH_ONLY, Jagged, as_array, as_bits, from_bits, typed_array

NUMERIC = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *TORCH_ONLY,
)
MSGPACK = ("str", "object")
DIGEST_BYTES = 16
# Blocks begin at multiples of this: a cache line, and the widest element.
ALIGNMENT = 64


class Layout(NamedTuple):
    """How the rows of a column lie in its flat array: `jagged` rows are [length, *row_shape], others [*row_shape]."""

    jagged: bool
    row_shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'variable-length' if self.jagged else 'fixed-size'} rows of shape {list(self.row_shape)}"


@dataclass(frozen=True)
class ColumnWrite:
    """One column of one put, as metadata: row i is elements [start[i], start[i] + length[i]) of `nbytes` bytes.

    `digests` holds 16 bytes a row: equal rows have equal ones. It is empty as long as nobody needs to compare.
    """

    layout: Layout
    start: np.ndarray
    length: np.ndarray
    digests: bytes
    nbytes: int

    def digest(self, row: int) -> bytes:
        return self.digests[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]

    def as_data(self) -> list[Any]:
        """Plain data for a message or a journal; `from_data` makes it a ColumnWrite again."""
        return [self.layout.jagged, list(self.layout.row_shape), self.start, self.length, self.digests, self.nbytes]

    @classmethod
    def from_data(cls, data: Sequence[Any]) -> ColumnWrite:
        jagged, row_shape, start, length, digests, nbytes = data
        return cls(Layout(jagged, tuple(row_shape)), start, length, digests, nbytes)


class Place(NamedTuple):
    """Where a block (the flat array of one put and column) lies: `nbytes` at `offset` of the arena of `node`.

    It is part of the extent of its put, `size` bytes at `extent`.
    """

    node: str
    extent: int
    size: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ColumnRead:
    """One column of a batch, as metadata: row i is elements [start[i], start[i] + length[i]) of `places[block[i]]`."""

    dtype: str
    layout: Layout
    places: list[Place]
    block: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def select(self, rows: Sequence[int] | np.ndarray) -> ColumnRead:
        """The same column for some rows, with only the blocks that they lie in."""
        index = np.asarray(rows, np.int64)
        used, block = np.unique(self.block[index], return_inverse=True)
        places = [self.places[position] for position in used]
        return replace(self, places=places, block=block, start=self.start[index], length=self.length[index])

    def as_data(self) -> list[Any]:
        """Plain data for a message; `from_data` makes it a ColumnRead again."""
        jagged, row_shape = self.layout
        places = [list(place) for place in self.places]
        return [self.dtype, jagged, list(row_shape), places, self.block, self.start, self.length]

    @classmethod
    def from_data(cls, data: Sequence[Any]) -> ColumnRead:
        dtype, jagged, row_shape, places, block, start, length = data
        return cls(dtype, Layout(jagged, tuple(row_shape)), [Place(*place) for place in places], block, start, length)


class Encoded(NamedTuple):
    """A column of a put: its metadata without digests, its contiguous arrays in the order in which they are laid, and
    the bytes that had to be copied for them (a tensor, an array, or a list of them is the caller's own memory)."""

    write: ColumnWrite
    pieces: list[np.ndarray]
    copied: int

    def with_digests(self) -> ColumnWrite:
        """The metadata with the digest of every row; reads all of the payload."""
        return replace(self.write, digests=_row_digests(self.pieces, self.write.layout, self.write.length))


def check_dtypes(columns: Mapping[str, str]) -> None:
    for name, dtype in columns.items():
        if dtype not in NUMERIC + MSGPACK:
            known = ", ".join(NUMERIC + MSGPACK)
            raise InvalidRequest(f"column {name!r} has the unsupported dtype {dtype!r}; supported: {known}")


def lay_out(writes: Mapping[str, ColumnWrite], columns: Iterable[str]) -> tuple[dict[str, int], int]:
    """The byte at which each of `columns` begins in the extent of a put, and the extent's size."""
    offsets, end = {}, 0
    for column in columns:
        offsets[column] = end
        end += -(-writes[column].nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, max(end, ALIGNMENT)


def encode(name: str, dtype: str, values: Any, count: int) -> Encoded:
    """The metadata and the contiguous arrays of one column of a put with `count` keys.

    Raises: ColumnMismatch when the values do not have the column's dtype or `count` rows.
    """
    arrays, lengths = (_packed if dtype in MSGPACK else _numeric)(name, dtype, values)
    rows = len(arrays[0]) if lengths is None else len(lengths)
    if rows != count:
        raise ColumnMismatch(f"column {name!r} has {rows} rows for {count} keys")
    pieces = [np.ascontiguousarray(array) for array in arrays]
    copied = sum(
        piece.nbytes
        for piece, array in zip(pieces, arrays, strict=True)
        if piece is not array or not _is_callers(dtype, values)
    )
    length = lengths if lengths is not None else np.ones(count, np.int64)
    start = np.cumsum(length) - length
    layout = Layout(lengths is not None, pieces[0].shape[1:])
    nbytes = sum(piece.nbytes for piece in pieces)
    return Encoded(ColumnWrite(layout, start, length, b"", nbytes), pieces, copied)


def _is_callers(dtype: str, values: Any) -> bool:
    """Whether the arrays are the caller's memory, and not made here of Python numbers or objects."""
    if dtype in MSGPACK:
        return False
    return hasattr(values, "dtype") or isinstance(values, Jagged) or all(hasattr(value, "dtype") for value in values)


def _packed(name: str, dtype: str, values: Any) -> tuple[list[np.ndarray], np.ndarray]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ColumnMismatch(f"column {name!r} is {dtype!r} and takes a list with one value a sample")
    if dtype == "str" and (wrong := next((value for value in values if not isinstance(value, str)), None)) is not None:
        raise ColumnMismatch(f"column {name!r} takes strings, got {type(wrong).__name__}")
    try:
        packed = [msgpack.packb(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise ColumnMismatch(f"column {name!r} takes what msgpack can carry: {error}") from None
    return [np.frombuffer(b"".join(packed), np.uint8)], np.array([len(row) for row in packed], np.int64)


def _numeric(name: str, dtype: str, values: Any) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The arrays as they are, and the lengths of variable-length rows (None for fixed-size ones)."""
    lengths = None
    if dtype in TORCH_ONLY:
        values, dtype = _bits(name, dtype, values), TORCH_ONLY[dtype]
    if isinstance(values, Jagged):
        arrays, lengths = [values.values], values.lengths
    elif isinstance(values, (list, tuple)) and any(np.ndim(value) for value in values):
        arrays = [typed_array(value, dtype) for value in values]
        if any(array.ndim == 0 or array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise ColumnMismatch(f"rows of column {name!r} differ in more than their length")
        lengths = np.array([len(array) for array in arrays], np.int64)
    else:
        arrays = [typed_array(values, dtype) if isinstance(values, (list, tuple)) else as_array(values)]
    if wrong := next((array.dtype for array in arrays if array.dtype != np.dtype(dtype)), None):
        raise ColumnMismatch(f"column {name!r} is {dtype}, got {wrong}; cast it before the put")
    if arrays[0].ndim == 0:
        raise ColumnMismatch(f"column {name!r} got a single number; the first dimension is the samples")
    return arrays, lengths


def _bits(name: str, dtype: str, values: Any) -> Any:
    """The same rows as integers: for types that numpy lacks."""
    tensors = [values.values] if isinstance(values, Jagged) else values if isinstance(values, list) else [values]
    found = [str(getattr(value, "dtype", type(value).__name__)) for value in tensors]
    if wrong := [kind for kind in found if kind != f"torch.{dtype}"]:
        raise ColumnMismatch(f"column {name!r} is {dtype} and takes tensors of that type, got {wrong[0]}")
    if isinstance(values, Jagged):
        return Jagged(as_bits(values.values), values.offsets)
    return [as_bits(value) for value in values] if isinstance(values, list) else as_bits(values)


def _row_digests(pieces: Sequence[np.ndarray], layout: Layout, length: np.ndarray) -> bytes:
    row_bytes = int(np.prod(layout.row_shape)) * pieces[0].dtype.itemsize
    if not layout.jagged and row_bytes <= DIGEST_BYTES:
        # So few bytes are their own digest.
        rows = np.zeros((len(length), DIGEST_BYTES), np.uint8)
        rows[:, :row_bytes] = pieces[0].reshape(-1).view(np.uint8).reshape(len(length), row_bytes)
        return rows.tobytes()
    digest = xxhash.xxh3_128_digest
    if len(pieces) > 1:
        return b"".join([digest(piece.reshape(-1).view(np.uint8).data) for piece in pieces])
    data = pieces[0].reshape(-1).view(np.uint8).data
    sizes = (length * row_bytes).tolist()
    ends = np.cumsum(length * row_bytes).tolist()
    return b"".join([digest(data[end - size : end]) for end, size in zip(ends, sizes, strict=True)])


def _gather(read: ColumnRead, blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The rows one after the other: a view when they lie so in one block, otherwise one copy."""
    end = read.start + read.length
    breaks = np.flatnonzero((read.block[1:] != read.block[:-1]) | (read.start[1:] != end[:-1])) + 1
    firsts, lasts = np.append(0, breaks), np.append(breaks, len(read.block)) - 1
    runs = [blocks[read.block[first]][read.start[first] : end[last]] for first, last in zip(firsts, lasts, strict=True)]
    return runs[0] if len(runs) == 1 else np.concatenate(runs)


def flat_rows(read: ColumnRead, fetch: Callable[[list[Place]], Sequence[np.ndarray]]) -> np.ndarray:
    """The rows of a column one after the other; `fetch` gives the bytes (uint8) of its places."""
    dtype = "uint8" if read.dtype in MSGPACK else TORCH_ONLY.get(read.dtype, read.dtype)
    if not len(read.block):
        return np.zeros((0, *read.layout.row_shape), dtype)
    return _gather(read, [data.view(dtype).reshape(-1, *read.layout.row_shape) for data in fetch(read.places)])


def as_values(read: ColumnRead, flat: np.ndarray) -> Any:
    """What a stage sees of the rows that `flat_rows` gave: a Jagged, an array (or tensor) [S, ...], or a list."""
    typed = from_bits(flat, read.dtype) if read.dtype in TORCH_ONLY else flat
    if not read.layout.jagged:
        return typed
    jagged = Jagged(typed, np.append(0, np.cumsum(read.length)))
    if read.dtype in MSGPACK:
        return [msgpack.unpackb(row, strict_map_key=False) for row in jagged.rows()]
    return jagged
