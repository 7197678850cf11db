"""Rows of different lengths in one flat array."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from transfer_dock.errors import ColumnMismatch

# Numbers that torch has and numpy has not, and the integers of the same bits.
TORCH_ONLY = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}


def is_torch_only(value: Any) -> bool:
    return hasattr(value, "detach") and str(value.dtype).removeprefix("torch.") in TORCH_ONLY


def as_bits(tensor: Any) -> np.ndarray:
    """The integers of a tensor that numpy has no type for; a view if it is on the CPU and contiguous."""
    import torch

    bits = TORCH_ONLY[str(tensor.dtype).removeprefix("torch.")]
    return tensor.detach().cpu().contiguous().view(getattr(torch, bits)).numpy()


def from_bits(array: np.ndarray, dtype: str) -> Any:
    """The tensor that `as_bits` was given, over the same memory."""
    import torch

    return as_tensor(array).view(getattr(torch, dtype))


def as_array(value: Any) -> np.ndarray:
    """A numpy view of an array or a CPU tensor (a copy for one on a device), without importing torch."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def typed_array(values: Any, dtype: Any) -> np.ndarray:
    """An array or tensor as it is; Python numbers as `dtype`, refusing fractions where it is an integer."""
    if hasattr(values, "dtype"):
        return as_array(values)
    found = np.asarray(values)
    if dtype is not None and found.size and np.dtype(dtype).kind in "biu" and found.dtype.kind not in "biu":
        raise ColumnMismatch(f"{found.dtype} values do not fit {np.dtype(dtype)}")
    return np.asarray(values, dtype)


def as_tensor(array: Any) -> Any:
    """A torch view of `array` without a copy. What the dock gave is shared and read-only: clone before writing."""
    if hasattr(array, "detach"):
        return array
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Jagged:
    """S rows; row i is `values[offsets[i]:offsets[i + 1]]`.

    Args: values [T, ...] array or tensor; offsets [S + 1] integers, from 0 to T, never falling. `values` and rows are
    numpy arrays; of bfloat16 and float8, which numpy lacks, they are tensors.
    Raises: ColumnMismatch when the offsets do not describe the values.
    """

    def __init__(self, values: Any, offsets: Any) -> None:
        self.values = values.detach() if is_torch_only(values) else as_array(values)
        self.offsets = np.ascontiguousarray(as_array(offsets), dtype=np.int64)
        if self.values.ndim < 1 or self.offsets.ndim != 1 or len(self.offsets) < 1:
            raise ColumnMismatch("a Jagged needs values [T, ...] and offsets [S + 1]")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.values) or np.any(np.diff(self.offsets) < 0):
            raise ColumnMismatch(
                f"the offsets of a Jagged rise from 0 to the {len(self.values)} values it holds, "
                f"got {self.offsets[0]} to {self.offsets[-1]}"
            )

    @classmethod
    def from_rows(cls, rows: Sequence[Any], dtype: Any = None) -> Jagged:
        """Copy rows [length_i, ...] (arrays, tensors or lists) into one; `dtype` is needed when there are none."""
        arrays = [typed_array(row, dtype) for row in rows]
        if not arrays:
            return cls(np.zeros(0, dtype), [0])
        try:
            values = np.concatenate(arrays)
        except ValueError as error:
            raise ColumnMismatch(f"rows of a Jagged differ in more than their length: {error}") from None
        return cls(values, np.cumsum([0, *map(len, arrays)]))

    @property
    def lengths(self) -> np.ndarray:
        """[S] int64"""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """A view of one row; negative indices count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a Jagged with {len(self)} rows")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def rows(self) -> list[np.ndarray]:
        """Views of all rows."""
        return [self.row(index) for index in range(len(self))]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.rows())

    def torch(self) -> tuple[Any, Any]:
        """(values [T, ...], offsets [S + 1] int64) as tensors over the same memory: clone before writing."""
        return as_tensor(self.values), as_tensor(self.offsets)

    def __repr__(self) -> str:
        return f"Jagged({len(self)} rows, {self.values.dtype} {list(self.values.shape)})"
