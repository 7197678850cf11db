"""Prompts that a CPU engine computes over several steps, without random numbers for what is drawn meanwhile."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from qerl_rl.rollout.patching import existing


class _Spare(torch.Generator):
    """Draws what is thrown away; a generator of a CPU has no offset that could be set back."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Nothing that counts was drawn."""


def partial_prompts_draw_from_spare_generators() -> None:
    """Let rows whose prompt is not complete yet draw from generators that nobody reads again.

    Without it vLLM draws a token for each of them too, and sets the request's generator back afterwards, which raises
    on CPUs: chunked prefill with a seed fails.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    sample = existing(GPUModelRunner, "_sample")
    keep_books = existing(GPUModelRunner, "_bookkeeping_sync")

    @functools.wraps(sample)
    def _sample(self: Any, *arguments: Any, **options: Any) -> Any:
        generators, rows = self.input_batch.generators, self.input_batch.num_reqs
        partial = np.flatnonzero(self.discard_request_mask.np[:rows]).tolist()
        self.qerl_generators = {row: generators[row] for row in partial if row in generators}
        generators.update({row: _Spare() for row in self.qerl_generators})
        return sample(self, *arguments, **options)

    @functools.wraps(keep_books)
    def _bookkeeping_sync(self: Any, *arguments: Any, **options: Any) -> Any:
        kept = keep_books(self, *arguments, **options)
        self.input_batch.generators.update(self.qerl_generators)
        return kept

    GPUModelRunner._sample = _sample
    GPUModelRunner._bookkeeping_sync = _bookkeeping_sync
