"""RMSNorm on a CPU in one pass over memory: vLLM's arithmetic, but for the order of the sum of squares."""

from __future__ import annotations

import functools
from typing import Any

import torch

from qerl_rl.platform import bfloat16_loops
from qerl_rl.rollout.patching import existing


def norms_in_one_pass() -> None:
    """Compute norms of bfloat16 in one loop.

    Without it each of their operations, which nothing fuses where nothing is compiled, goes through memory: a fifth of
    the time of a prefill of 1,000 tokens. (vLLM's own kernel knows no weights of another type, as noise makes them.)
    """
    from vllm.model_executor.layers.layernorm import RMSNorm

    original = existing(RMSNorm, "forward_native")

    @functools.wraps(original)
    def forward_native(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if not bfloat16_loops.has_loops(x) or not self.has_weight or self.variance_size_override is not None:
            return original(self, x, residual)
        return bfloat16_loops.rms_norm(x, self.weight.data, self.variance_epsilon, residual)

    RMSNorm.forward_native = forward_native
