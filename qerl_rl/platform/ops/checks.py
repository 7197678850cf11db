"""Which implementation a tensor takes, and errors that say what an operator was given and what it needs."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""What Ascend's floating-point kernels take; references also take float64, in which gradients can be checked."""


def on_npu(tensor: torch.Tensor) -> bool:
    """Whether the fused kernel computes on this tensor."""
    return tensor.device.type == "npu"


def has_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels run on this tensor: on CUDA always, on an NPU where triton-ascend is installed."""
    return tensor.device.type == "cuda" or (on_npu(tensor) and has_triton_ascend())


@functools.cache
def has_triton_ascend() -> bool:
    """Whether the installed Triton makes kernels for NPUs."""
    # It is a Triton of its own, with one backend more.
    found = importlib.util.find_spec("triton") is not None
    return found and importlib.util.find_spec("triton.backends.ascend") is not None


def require(holds: bool, operator: str, needed: str, **given: Any) -> None:
    """Raises: ValueError that names the operator, what it needs, and type and shape of what was given."""
    if not holds:
        described = ", ".join(f"{name} {_description(value)}" for name, value in given.items())
        raise ValueError(f"{operator} needs {needed}; it was given {described}")


def require_floats(operator: str, **given: torch.Tensor) -> None:
    """Raises: ValueError unless all are floats of one type, on one device, and on an NPU one of `FLOATS`."""
    first, *others = given.values()
    alike = all(other.dtype == first.dtype and other.device == first.device for other in others)
    allowed = first.dtype in FLOATS if on_npu(first) else first.is_floating_point()
    require(alike and allowed, operator, "floats (16 or 32 bits on an NPU) of one type on one device", **given)


def _description(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
