"""What loops over tensors in host memory share, compiled by numba: arrays of tensors, and numbers that numba lacks.

numba has no bfloat16: arrays are its bits (uint16). A loop has few arrays and indices that begin at 0, without which
LLVM does not vectorize it; it holds no lock of Python's, so that threads run side by side. numba compiles a loop again
when its own file has changed: after a change here or in `amx.py`, delete `__pycache__` beside the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy import float32, int32, uint16, uint32


class _Memory:
    """What numpy takes for an array: a tensor's numbers as `kind`, of the same size. Tensor.numpy() would tie the
    storage, so that the trainer's weights could not leave memory any more."""

    def __init__(self, tensor: torch.Tensor, kind: type) -> None:
        # The array keeps this object, and with it the tensor.
        self._tensor, size = tensor, tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), False),
            "typestr": np.dtype(kind).str,
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
        }


def array(tensor: torch.Tensor, kind: type) -> np.ndarray:
    """The tensor's memory as numbers of `kind`. Raises: TypeError for a kind of another size."""
    if tensor.element_size() != np.dtype(kind).itemsize:
        raise TypeError(f"numbers of {tensor.dtype} are not as long as those of {np.dtype(kind)}")
    # An empty tensor has no address.
    return np.asarray(_Memory(tensor, kind)) if tensor.numel() else np.empty(tuple(tensor.shape), kind)


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Of bfloat16."""
    return array(tensor, uint16)


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's decorator; what it compiles is kept beside the loop's file, or in the user's cache, for others."""

    def decorate(loop: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(loop)
        except RuntimeError:
            # There is no folder to write to.
            return njit(nogil=True, **options)(loop)

    return decorate


@njit(inline="always")
def to_float(bits):
    """Of a bfloat16's bits."""
    return uint32(uint32(bits) << uint32(16)).view(float32)


@njit(inline="always")
def rounded(number):
    """The bits of the nearest bfloat16, in a uint32; of two as near, of the even one. No NaN that arithmetic makes has
    so many bits set that adding to them overflows."""
    bits = float32(number).view(uint32)
    return uint32(uint32(bits + uint32(0x7FFF) + uint32(uint32(bits >> uint32(16)) & uint32(1))) >> uint32(16))


@njit(inline="always")
def exponential(number):
    """e^x of float32 by Cephes' expf: 2^n e^r with |r| <= log(2) / 2, whose polynomial is good to a bit or two.

    numba's own is a call a number, which no loop around it can be vectorized over.
    """
    number = min(max(number, float32(-87)), float32(87))
    power = np.floor(number * float32(1.44269504088896341) + float32(0.5))
    # log(2) in two parts, the first of which has so few bits that its product is exact.
    rest = number - power * float32(0.693359375) + power * float32(2.12194440e-4)
    value = float32(1.9875691500e-4)
    value = value * rest + float32(1.3981999507e-3)
    value = value * rest + float32(8.3334519073e-3)
    value = value * rest + float32(4.1665795894e-2)
    value = value * rest + float32(1.6666665459e-1)
    value = value * rest + float32(5.0000001201e-1)
    value = value * rest * rest + rest + float32(1)
    return value * uint32(uint32(int32(power) + int32(127)) << uint32(23)).view(float32)
