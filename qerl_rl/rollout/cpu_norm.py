"""RMSNorm of many tokens on a CPU: vLLM's own arithmetic, a cacheful of tokens at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 16
"""256 KiB of float32, of which a norm makes half a dozen."""


def norms_stay_in_cache() -> None:
    """Compute the norms of a prefill a few tokens at a time.

    Without it each of their operations, which nothing fuses where nothing is compiled, goes through memory: a third of
    the time of a prefill of 1,000 tokens over int8 experts.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm

    RMSNorm.forward_native = in_chunks(RMSNorm.forward_native)


def in_chunks(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original(norm, x, residual)` on some rows of x [tokens, ...] after the other: the same numbers."""

    @functools.wraps(original)
    def forward(norm: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        tokens = max(1, CHUNK_ELEMENTS // max(1, x[:1].numel()))
        if len(x) <= tokens:
            return original(norm, x, residual)
        output = torch.empty(x.shape, dtype=x.dtype)
        if residual is None:
            for rows, result in zip(x.split(tokens), output.split(tokens), strict=True):
                result.copy_(original(norm, rows, None))
            return output
        total = torch.empty(residual.shape, dtype=residual.dtype)
        chunks = (tensor.split(tokens) for tensor in (x, residual, output, total))
        for rows, others, result, summed in zip(*chunks, strict=True):
            normed, added = original(norm, rows, others)
            result.copy_(normed)
            summed.copy_(added)
        return output, total

    return forward
