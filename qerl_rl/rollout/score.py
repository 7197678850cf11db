"""Log-probs of given tokens by the engine's own kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from qerl_rl.rollout.vllm_objects import model_runner


def score(engine: Any, tokens: Sequence[np.ndarray], temperature: float) -> list[np.ndarray]:
    """See VllmEngine.score. Args: engine: a vLLM LLMEngine without requests. temperature: 0 leaves the logits."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    # The token that has to be drawn behind each of them is thrown away.
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    found: dict[int, np.ndarray] = {}
    sampler = model_runner(engine).sampler
    with _tempered(sampler, temperature):
        for index, row in enumerate(tokens):
            engine.add_request(f"score:{index}", TokensPrompt(prompt_token_ids=row.tolist()), params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split(":")[1])
                # One number a token: of the first nothing can be said.
                found[index] = np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32)
    return [found[index] for index in range(len(tokens))]


@contextmanager
def _tempered(sampler: Any, temperature: float) -> Iterator[None]:
    """Inside, log-probs are of the logits over `temperature`: vLLM gives those of a prompt at 1, whatever is asked."""
    if temperature in (0.0, 1.0):
        yield
        return
    original = sampler.compute_logprobs

    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        return original(logits.float() / temperature)

    sampler.compute_logprobs = compute_logprobs
    try:
        yield
    finally:
        del sampler.compute_logprobs
