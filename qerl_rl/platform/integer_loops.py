"""Rounding weights in host memory to integers: one pass where torch's operations make three and five."""

from __future__ import annotations

import numpy as np
import torch
from numpy import float32, int8, int32, uint16, uint32

from qerl_rl.platform.loops import array, compiled, to_float

_KINDS = {torch.bfloat16: uint16, torch.float32: float32}


def has_loops(tensor: torch.Tensor) -> bool:
    """Whether the functions below take such weights."""
    return tensor.dtype in _KINDS and tensor.device.type == "cpu"


def largest_magnitudes(weights: torch.Tensor) -> torch.Tensor:
    """float32 [groups]: the largest |number| of each row of [groups, K]."""
    out = torch.empty(len(weights))
    loop, bits = (_largest_bfloat16, uint16) if weights.dtype == torch.bfloat16 else (_largest_float32, uint32)
    loop(array(weights, bits), array(out, uint32))
    return out


def round_quotients(weights: torch.Tensor, steps: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """int8 [..., K]: weights [..., K] / steps [..., 1] float32, to the nearest integer of `low` .. `high`, of two as
    near to the even one."""
    groups = weights.reshape(-1, weights.shape[-1])
    out = torch.empty(groups.shape, dtype=torch.int8)
    loop = _round_bfloat16 if weights.dtype == torch.bfloat16 else _round_float32
    loop(
        array(groups, _KINDS[weights.dtype]),
        array(steps.reshape(-1), float32),
        float32(low),
        float32(high),
        array(out, int8),
    )
    return out.view(weights.shape)


# Without their signs floats are ordered as their bits are, what is no number above all others.
@compiled()
def _largest_bfloat16(weights, out):
    for group in range(weights.shape[0]):
        largest = uint16(0)
        for index in range(weights.shape[1]):
            largest = max(largest, uint16(weights[group, index] & uint16(0x7FFF)))
        out[group] = uint32(uint32(largest) << uint32(16))


@compiled()
def _largest_float32(weights, out):
    for group in range(weights.shape[0]):
        largest = uint32(0)
        for index in range(weights.shape[1]):
            largest = max(largest, uint32(weights[group, index] & uint32(0x7FFFFFFF)))
        out[group] = largest


@compiled(error_model="numpy")
def _round_bfloat16(weights, steps, low, high, out):
    for group in range(weights.shape[0]):
        step = steps[group]
        for index in range(weights.shape[1]):
            quotient = to_float(weights[group, index]) / step
            out[group, index] = int8(int32(np.rint(min(max(quotient, low), high))))


@compiled(error_model="numpy")
def _round_float32(weights, steps, low, high, out):
    for group in range(weights.shape[0]):
        step = steps[group]
        for index in range(weights.shape[1]):
            out[group, index] = int8(int32(np.rint(min(max(weights[group, index] / step, low), high))))
