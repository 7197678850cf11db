"""Loops over bfloat16 in host memory that go over it once, compiled by numba where torch's kernels go over it several
times: in float32, rounded once.

numba has no bfloat16: arrays are its bits (uint16). Each loop has few arrays and indices that begin at 0, without
which LLVM does not vectorize it; each holds no lock of Python's, so that threads run side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy import float32, int32, uint16, uint32


def has_loops(tensor: torch.Tensor) -> bool:
    """Whether it is what the functions below take."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def convert_int8(integers: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` bfloat16 = int8 of the same shape, contiguous both."""
    _convert_int8(_array(integers, np.int8).reshape(-1), _bits(out).reshape(-1))
    return out


def multiply_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., K] from nibbles plus 8, uint8 [..., K / 2] (the first of a pair in the low half), and the scales
    [..., groups] bfloat16 of equal parts of a row; contiguous both."""
    groups = scales.numel()
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.bfloat16)
    # Two numbers side by side are written as one integer, the first in its low half.
    pairs = _bits(out).view(uint32).reshape(groups, -1)
    _multiply_int4(_array(packed, np.uint8).reshape(groups, -1), _bits(scales).reshape(-1), pairs)
    return out


def scale_columns(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` [T, N] = matrix * scales [N] float32; it is not the matrix (the loop would go number by number)."""
    _scale_columns(_bits(matrix), _array(scales, float32), _bits(out))
    return out


def weighted_swiglu(hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * probability [T, I] of hidden [T, 2I] and probabilities [T] float32."""
    halves = _halves(hidden)
    out = hidden.new_empty(halves.shape[0], halves.shape[2])
    _weighted_swiglu(halves, _array(probabilities, float32), _bits(out))
    return out


def weighted_swiglu_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden [T, 2I] and probabilities [T] float32 from that of the output [T, I], and the output."""
    halves, grad_hidden, output = _halves(hidden), hidden.new_empty(hidden.shape), hidden.new_empty(gradient.shape)
    grad_probabilities = probabilities.new_empty(probabilities.shape)
    _weighted_swiglu_backward(
        _bits(gradient),
        halves,
        _array(probabilities, float32),
        _bits(grad_hidden).reshape(halves.shape),
        _array(grad_probabilities, float32),
        _bits(output),
    )
    return grad_hidden, grad_probabilities, output


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """weight * x / sqrt(mean of x^2 + epsilon) over the last dimension (arXiv 1910.07467), x [..., H] bfloat16.

    Args: weight [H]: with bfloat16 what it multiplies is rounded before, as elsewhere in torch; with float32 it isn't.
        residual: of the shape of x; their sum is normed then, unrounded.
    Returns: [..., H], and with a residual the sum too, rounded.
    """
    width = x.size(-1)
    rows, rounds = _bits(x.contiguous()).reshape(-1, width), weight.dtype == torch.bfloat16
    out, scale = torch.empty(x.shape, dtype=x.dtype), _array(weight.detach().float(), float32)
    if residual is None:
        _rms_norm(rows, scale, float32(epsilon), rounds, _bits(out).reshape(rows.shape))
        return out
    total = torch.empty(x.shape, dtype=x.dtype)
    others, sums = _bits(residual.contiguous()).reshape(rows.shape), _bits(total).reshape(rows.shape)
    _add_rms_norm(rows, others, scale, float32(epsilon), rounds, sums, _bits(out).reshape(rows.shape))
    return out, total


def _halves(hidden: torch.Tensor) -> np.ndarray:
    """Gate and up [T, 2, I] as bits."""
    return _bits(hidden).reshape(hidden.size(0), 2, hidden.size(1) // 2)


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


def _array(tensor: torch.Tensor, kind: type) -> np.ndarray:
    if tensor.element_size() != np.dtype(kind).itemsize:
        raise TypeError(f"numbers of {tensor.dtype} are not as long as those of {np.dtype(kind)}")
    # An empty tensor has no address.
    return np.asarray(_Memory(tensor, kind)) if tensor.numel() else np.empty(tuple(tensor.shape), kind)


def _bits(tensor: torch.Tensor) -> np.ndarray:
    return _array(tensor, uint16)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's decorator; what it compiles is kept beside this file, or in the user's cache, for the next process."""

    def decorate(loop: Callable[..., Any]) -> Any:
        try:
            return njit(nogil=True, cache=True, **options)(loop)
        except RuntimeError:
            # There is no folder to write to.
            return njit(nogil=True, **options)(loop)

    return decorate


@njit(inline="always")
def _float(bits):
    return uint32(uint32(bits) << uint32(16)).view(float32)


@njit(inline="always")
def _rounded(number):
    """The bits of the nearest bfloat16, in a uint32; of two as near, of the even one. No NaN that arithmetic makes has
    so many bits set that adding to them overflows."""
    bits = float32(number).view(uint32)
    return uint32(uint32(bits + uint32(0x7FFF) + uint32(uint32(bits >> uint32(16)) & uint32(1))) >> uint32(16))


@_compiled()
def _convert_int8(integers, out):
    for index in range(integers.size):
        # Eight bits fit into the nine of a bfloat16's mantissa and sign.
        out[index] = uint16(float32(integers[index]).view(uint32) >> uint32(16))


@_compiled()
def _multiply_int4(packed, scales, out):
    for group in range(packed.shape[0]):
        scale = _float(scales[group])
        for index in range(packed.shape[1]):
            # numba would go on with 64 bits if it were left to choose.
            pair = int32(packed[group, index])
            low = float32(int32(int32(pair & int32(15)) - int32(8))) * scale
            high = float32(int32(int32(pair >> int32(4)) - int32(8))) * scale
            out[group, index] = uint32(_rounded(low) | uint32(_rounded(high) << uint32(16)))


@_compiled()
def _scale_columns(matrix, scales, out):
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            out[row, column] = uint16(_rounded(_float(matrix[row, column]) * scales[column]))


@njit(inline="always")
def _exponential(number):
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


@_compiled(error_model="numpy")
def _sigmoids(gates, out):
    for column in range(out.size):
        out[column] = float32(1) / (float32(1) + _exponential(-_float(gates[column])))


@_compiled()
def _weighted_swiglu(halves, probabilities, out):
    sigmoid = np.empty(out.shape[1], float32)
    for row in range(out.shape[0]):
        probability = probabilities[row]
        _sigmoids(halves[row, 0], sigmoid)
        for column in range(sigmoid.size):
            activated = _float(halves[row, 0, column]) * sigmoid[column]
            out[row, column] = uint16(_rounded(activated * _float(halves[row, 1, column]) * probability))


# Only the order of the sum is LLVM's choice, always the same one for rows of a length.
@_compiled(fastmath={"reassoc"})
def _weighted_swiglu_backward(gradient, halves, probabilities, grad_halves, grad_probabilities, out):
    sigmoid = np.empty(out.shape[1], float32)
    for row in range(out.shape[0]):
        probability, total = probabilities[row], float32(0)
        _sigmoids(halves[row, 0], sigmoid)
        for column in range(sigmoid.size):
            activated = _float(halves[row, 0, column]) * sigmoid[column]
            total += _float(gradient[row, column]) * activated * _float(halves[row, 1, column])
        grad_probabilities[row] = total
        for column in range(sigmoid.size):
            activated = _float(halves[row, 0, column]) * sigmoid[column]
            out[row, column] = uint16(_rounded(activated * _float(halves[row, 1, column]) * probability))
        for column in range(sigmoid.size):
            activated = _float(halves[row, 0, column]) * sigmoid[column]
            grad_halves[row, 1, column] = uint16(_rounded(_float(gradient[row, column]) * probability * activated))
        for column in range(sigmoid.size):
            gate, up = _float(halves[row, 0, column]), _float(halves[row, 1, column])
            # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
            slope = sigmoid[column] + (float32(1) - sigmoid[column]) * (gate * sigmoid[column])
            weighted = _float(gradient[row, column]) * probability
            grad_halves[row, 0, column] = uint16(_rounded(slope * (weighted * up)))


@_compiled()
def _rms_norm(x, weight, epsilon, rounds, out):
    exact = np.empty(x.shape[1], float32)
    for row in range(x.shape[0]):
        for column in range(exact.size):
            exact[column] = _float(x[row, column])
        _norm_row(exact, weight, epsilon, rounds, out[row])


@_compiled()
def _add_rms_norm(x, residual, weight, epsilon, rounds, total, out):
    exact = np.empty(x.shape[1], float32)
    for row in range(x.shape[0]):
        for column in range(exact.size):
            exact[column] = _float(x[row, column]) + _float(residual[row, column])
        for column in range(exact.size):
            total[row, column] = uint16(_rounded(exact[column]))
        _norm_row(exact, weight, epsilon, rounds, out[row])


@_compiled()
def _norm_row(exact, weight, epsilon, rounds, out):
    factor = float32(1) / np.sqrt(_sum_of_squares(exact) / float32(exact.size) + epsilon)
    if rounds:
        for column in range(exact.size):
            out[column] = uint16(_rounded(_float(_rounded(exact[column] * factor)) * weight[column]))
    else:
        for column in range(exact.size):
            out[column] = uint16(_rounded(exact[column] * factor * weight[column]))


@_compiled(fastmath={"reassoc"})
def _sum_of_squares(numbers):
    total = float32(0)
    for index in range(numbers.size):
        total += numbers[index] * numbers[index]
    return total
