"""Fused kernels that a run does without, to find out which of them a difference is from (train.mindspeed)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qerl_rl.platform.ops.checks import on_npu

OPERATORS = ("rms_norm", "swiglu", "rotary", "packed_attention", "grouped_matmul", "token_permute")
_left_out: frozenset[str] = frozenset()


def leave_out(operators: Iterable[str]) -> None:
    """Compute these of `OPERATORS` by their torch references from now on, on an NPU as well.

    Raises: ValueError for another name.
    """
    global _left_out
    chosen = frozenset(operators)
    if not chosen <= frozenset(OPERATORS):
        raise ValueError(f"{sorted(chosen - frozenset(OPERATORS))} are not among {', '.join(OPERATORS)}")
    _left_out = chosen


def fused(operator: str, tensor: torch.Tensor) -> bool:
    """Whether `operator` computes on this tensor by its fused kernel."""
    return on_npu(tensor) and operator not in _left_out


def is_left_out(operator: str) -> bool:
    """Whether this run does without the kernel of `operator`."""
    return operator in _left_out
