"""Loops over bfloat16 in host memory that go over it once, where torch's kernels go over it several times: in float32,
rounded once.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy import float32, int32, uint16, uint32

from qerl_rl.platform.loops import array, bits_of, compiled, exponential, rounded, to_float


def has_loops(tensor: torch.Tensor) -> bool:
    """Whether it is what the functions below take."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"


def convert_int8(integers: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` bfloat16 = int8 of the same shape, contiguous both."""
    _convert_int8(array(integers, np.int8).reshape(-1), bits_of(out).reshape(-1))
    return out


def multiply_int4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., K] from nibbles plus 8, uint8 [..., K / 2] (the first of a pair in the low half), and the scales
    [..., groups] bfloat16 of equal parts of a row; contiguous both."""
    groups = scales.numel()
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.bfloat16)
    # Two numbers side by side are written as one integer, the first in its low half.
    pairs = bits_of(out).view(uint32).reshape(groups, -1)
    _multiply_int4(array(packed, np.uint8).reshape(groups, -1), bits_of(scales).reshape(-1), pairs)
    return out


def scale_columns(matrix: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`out` [T, N] = matrix * scales [N] float32; it is not the matrix (the loop would go number by number)."""
    _scale_columns(bits_of(matrix), array(scales, float32), bits_of(out))
    return out


def weighted_swiglu(hidden: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * probability [T, I] of hidden [T, 2I] and probabilities [T] float32."""
    halves = _halves(hidden)
    out = hidden.new_empty(halves.shape[0], halves.shape[2])
    _weighted_swiglu(halves, array(probabilities, float32), bits_of(out))
    return out


def weighted_swiglu_backward(
    gradient: torch.Tensor, hidden: torch.Tensor, probabilities: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden [T, 2I] and probabilities [T] float32 from that of the output [T, I], and the output."""
    halves, grad_hidden, output = _halves(hidden), hidden.new_empty(hidden.shape), hidden.new_empty(gradient.shape)
    grad_probabilities = probabilities.new_empty(probabilities.shape)
    _weighted_swiglu_backward(
        bits_of(gradient),
        halves,
        array(probabilities, float32),
        bits_of(grad_hidden).reshape(halves.shape),
        array(grad_probabilities, float32),
        bits_of(output),
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
    rows, rounds = bits_of(x.contiguous()).reshape(-1, width), weight.dtype == torch.bfloat16
    out, scale = torch.empty(x.shape, dtype=x.dtype), array(weight.detach().float(), float32)
    if residual is None:
        _rms_norm(rows, scale, float32(epsilon), rounds, bits_of(out).reshape(rows.shape))
        return out
    total = torch.empty(x.shape, dtype=x.dtype)
    others, sums = bits_of(residual.contiguous()).reshape(rows.shape), bits_of(total).reshape(rows.shape)
    _add_rms_norm(rows, others, scale, float32(epsilon), rounds, sums, bits_of(out).reshape(rows.shape))
    return out, total


def _halves(hidden: torch.Tensor) -> np.ndarray:
    """Gate and up [T, 2, I] as bits."""
    return bits_of(hidden).reshape(hidden.size(0), 2, hidden.size(1) // 2)


@compiled()
def _convert_int8(integers, out):
    for index in range(integers.size):
        # Eight bits fit into the nine of a bfloat16's mantissa and sign.
        out[index] = uint16(float32(integers[index]).view(uint32) >> uint32(16))


@compiled()
def _multiply_int4(packed, scales, out):
    for group in range(packed.shape[0]):
        scale = to_float(scales[group])
        for index in range(packed.shape[1]):
            # numba would go on with 64 bits if it were left to choose.
            pair = int32(packed[group, index])
            low = float32(int32(int32(pair & int32(15)) - int32(8))) * scale
            high = float32(int32(int32(pair >> int32(4)) - int32(8))) * scale
            out[group, index] = uint32(rounded(low) | uint32(rounded(high) << uint32(16)))


@compiled()
def _scale_columns(matrix, scales, out):
    for row in range(matrix.shape[0]):
        for column in range(matrix.shape[1]):
            out[row, column] = uint16(rounded(to_float(matrix[row, column]) * scales[column]))


@compiled(error_model="numpy")
def _sigmoids(gates, out):
    for column in range(out.size):
        out[column] = float32(1) / (float32(1) + exponential(-to_float(gates[column])))


@compiled()
def _weighted_swiglu(halves, probabilities, out):
    sigmoid = np.empty(out.shape[1], float32)
    for row in range(out.shape[0]):
        probability = probabilities[row]
        _sigmoids(halves[row, 0], sigmoid)
        for column in range(sigmoid.size):
            activated = to_float(halves[row, 0, column]) * sigmoid[column]
            out[row, column] = uint16(rounded(activated * to_float(halves[row, 1, column]) * probability))


# Only the order of the sum is LLVM's choice, always the same one for rows of a length.
@compiled(fastmath={"reassoc"})
def _weighted_swiglu_backward(gradient, halves, probabilities, grad_halves, grad_probabilities, out):
    sigmoid = np.empty(out.shape[1], float32)
    for row in range(out.shape[0]):
        probability, total = probabilities[row], float32(0)
        _sigmoids(halves[row, 0], sigmoid)
        for column in range(sigmoid.size):
            activated = to_float(halves[row, 0, column]) * sigmoid[column]
            total += to_float(gradient[row, column]) * activated * to_float(halves[row, 1, column])
        grad_probabilities[row] = total
        for column in range(sigmoid.size):
            activated = to_float(halves[row, 0, column]) * sigmoid[column]
            out[row, column] = uint16(rounded(activated * to_float(halves[row, 1, column]) * probability))
        for column in range(sigmoid.size):
            activated = to_float(halves[row, 0, column]) * sigmoid[column]
            grad_halves[row, 1, column] = uint16(rounded(to_float(gradient[row, column]) * probability * activated))
        for column in range(sigmoid.size):
            gate, up = to_float(halves[row, 0, column]), to_float(halves[row, 1, column])
            # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
            slope = sigmoid[column] + (float32(1) - sigmoid[column]) * (gate * sigmoid[column])
            weighted = to_float(gradient[row, column]) * probability
            grad_halves[row, 0, column] = uint16(rounded(slope * (weighted * up)))


@compiled()
def _rms_norm(x, weight, epsilon, rounds, out):
    exact = np.empty(x.shape[1], float32)
    for row in range(x.shape[0]):
        for column in range(exact.size):
            exact[column] = to_float(x[row, column])
        _norm_row(exact, weight, epsilon, rounds, out[row])


@compiled()
def _add_rms_norm(x, residual, weight, epsilon, rounds, total, out):
    exact = np.empty(x.shape[1], float32)
    for row in range(x.shape[0]):
        for column in range(exact.size):
            exact[column] = to_float(x[row, column]) + to_float(residual[row, column])
        for column in range(exact.size):
            total[row, column] = uint16(rounded(exact[column]))
        _norm_row(exact, weight, epsilon, rounds, out[row])


@compiled()
def _norm_row(exact, weight, epsilon, rounds, out):
    factor = float32(1) / np.sqrt(_sum_of_squares(exact) / float32(exact.size) + epsilon)
    if rounds:
        for column in range(exact.size):
            out[column] = uint16(rounded(to_float(rounded(exact[column] * factor)) * weight[column]))
    else:
        for column in range(exact.size):
            out[column] = uint16(rounded(exact[column] * factor * weight[column]))


@compiled(fastmath={"reassoc"})
def _sum_of_squares(numbers):
    total = float32(0)
    for index in range(numbers.size):
        total += numbers[index] * numbers[index]
    return total
