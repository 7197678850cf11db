"""Values as bytes, for other processes and for the journal: msgpack beside raw arrays, never pickle."""

from __future__ import annotations

import struct
from typing import Any

import msgpack
import numpy as np

MAGIC = b"tdw1"
"""The first bytes of every packed value; a journal finds its records again by them."""

# Arrays lie behind the message at multiples of this: msgpack would copy them out of an extension, and not aligned.
_ALIGNMENT = 16
_HEAD = struct.Struct("<4sI8x")
_ARRAY = 1
_ARRAY_KINDS = "biufcmMSU"


def pack(value: Any) -> bytes:
    """None, bool, int (64 bits), float, str, bytes, list, tuple, dict and numpy arrays, nested as they like.

    Tuples and named tuples arrive as lists, except as keys of a dict; bytearrays and memoryviews as bytes.
    Raises: TypeError for anything else, also for numpy scalars and for arrays of objects, records or extension dtypes.
    """
    arrays: list[np.ndarray] = []
    end = 0

    def other(value: Any) -> Any:
        nonlocal end
        if isinstance(value, tuple):
            return list(value)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in _ARRAY_KINDS:
            what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(f"{what} cannot be sent: only msgpack's types and plain numpy arrays can")
        place = -end % _ALIGNMENT + end
        end = place + value.nbytes
        arrays.append(value)
        return msgpack.ExtType(_ARRAY, msgpack.packb((value.dtype.str, value.shape, place)))

    message = msgpack.packb(value, default=other, strict_types=True)
    head = _HEAD.pack(MAGIC, len(message))
    if not arrays:
        return head + message
    pieces = [head, message]
    filled = _HEAD.size + len(message)
    for array in arrays:
        gap = bytes(-filled % _ALIGNMENT)
        pieces += [gap, array.tobytes()]
        filled += len(gap) + array.nbytes
    return b"".join(pieces)


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """The value that `pack` was given. Arrays are read-only views of `data`, which they keep alive.

    Raises: ValueError when `data` is not what `pack` made.
    """
    view = memoryview(data)
    if len(view) < _HEAD.size or view[: len(MAGIC)] != MAGIC:
        raise ValueError("these bytes are not a packed value")
    _, length = _HEAD.unpack_from(view)
    end = _HEAD.size + length
    first_array = end + -end % _ALIGNMENT

    def extension(code: int, described: bytes) -> np.ndarray:
        if code != _ARRAY:
            raise ValueError(f"msgpack extension {code} is not one of the dock's")
        dtype, shape, place = msgpack.unpackb(described)
        array: np.ndarray = np.ndarray(shape, dtype, buffer=data, offset=first_array + place)
        array.flags.writeable = False
        return array

    message = view[_HEAD.size : end]
    try:
        return msgpack.unpackb(message, ext_hook=extension, strict_map_key=False)
    except TypeError:
        # A tuple among the keys came as a list; building every dict in Python would slow down all those without.
        return msgpack.unpackb(message, ext_hook=extension, strict_map_key=False, object_pairs_hook=_dict_of_pairs)


def _dict_of_pairs(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    return {_hashable(key): value for key, value in pairs}


def _hashable(key: Any) -> Any:
    return tuple(map(_hashable, key)) if isinstance(key, list) else key
