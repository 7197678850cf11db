"""The rollout engine against the trainer: log-probs of what it samples, speeds, and the layers where they part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
from torch import Tensor

from qerl_rl.algorithms.mismatch import rollout_mismatch
from qerl_rl.config.schema import LoraConfig, RolloutConfig
from qerl_rl.rollout.engine import GroupOutput, GroupRequest
from qerl_rl.train.samples import Samples
from qerl_rl.verify.policy import FrozenPolicy
from qerl_rl.verify.quantized import mean_divergence

SAMPLES, RESPONSE_TOKENS = 4, 32
"""Of each prompt."""


class EngineSide:
    """vLLM on the model of `folder`, alone on its card. Its process can have no other one, even after this one.

    Args: prompts, sequences: int64 [n] each, all that it will have to answer, or to read in one go.
    """

    def __init__(self, folder: Path, prompts: Sequence[Tensor], sequences: Sequence[Tensor]) -> None:
        begin = perf_counter()
        # It imports vLLM, which takes seconds.
        from qerl_rl.rollout.vllm_engine import VllmEngine

        longest = max(map(len, [*prompts, *sequences])) + RESPONSE_TOKENS
        options = RolloutConfig(
            data_parallel=1,
            expert_parallel=False,
            max_response_tokens=RESPONSE_TOKENS,
            max_sequences=max(128, len(sequences)),
            # All sequences fit into one prefill, which `added_by_layer` relies on.
            max_batched_tokens=max(2048, longest, sum(map(len, sequences))),
            # A cached prefix is not computed, and would leave no trace in the layers.
            prefix_caching=False,
        )
        no_adapters = LoraConfig(attention=False, experts=False, shared_experts=False)
        self._engine = VllmEngine(folder, options, no_adapters, max_length=longest, seed=0)
        self.load_seconds = perf_counter() - begin
        self.speeds: list[float] = []
        """Tokens a second of each generation so far; the first one also sets up."""

    def answer(self, prompts: Sequence[Tensor]) -> list[GroupOutput]:
        """SAMPLES responses of up to RESPONSE_TOKENS tokens to each prompt, at temperature 1; always the same."""
        requests = [GroupRequest(i, _row(prompt), SAMPLES, seed=i) for i, prompt in enumerate(prompts)]
        begin = perf_counter()
        outputs = sorted(self._engine.generate(requests), key=lambda output: output.group)
        tokens = sum(len(response) for output in outputs for response in output.responses)
        self.speeds.append(tokens / (perf_counter() - begin))
        return outputs

    def streams(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """By layer, the residual stream behind it, float32 [T, H], one sequence after another."""
        from qerl_rl.rollout.layer_streams import layer_streams

        # All prompts in one prefill, whose tokens lie one prompt after another: it is the first step of the engine.
        requests = [GroupRequest(i, _row(sequence), 1, seed=0) for i, sequence in enumerate(sequences)]
        with layer_streams(self._engine) as seen:
            list(self._engine.generate(requests))
        tokens, first = sum(map(len, sequences)), [steps[0] for steps in seen]
        if len(first[0]) != tokens:
            raise RuntimeError(f"the engine's first step computed {len(first[0])} tokens of {tokens}")
        return first


def mismatch(engine: EngineSide, policy: FrozenPolicy, prompts: Sequence[Tensor]) -> dict[str, float]:
    """`rollout_mismatch` of what the engine answers to the prompts."""
    tokens, lengths, sampled = [], [], []
    for prompt, output in zip(prompts, engine.answer(prompts), strict=True):
        for response, log_probs in zip(output.responses, output.log_probs, strict=True):
            tokens.append(np.concatenate([prompt.numpy(), response]).astype(np.int64))
            lengths.append(len(response))
            sampled.append(log_probs)
    return rollout_mismatch(sampled, policy.log_probs(Samples(tokens, lengths)))


def added_by_layer(engine: EngineSide, policy: FrozenPolicy, sequences: Sequence[Tensor]) -> list[float]:
    """By layer, the nats by which KL(trainer || trainer that goes on from the engine's stream behind it) grows."""
    exact = policy.logits(sequences)
    reached = [
        mean_divergence(exact, policy.logits_from(sequences, layer + 1, stream))
        for layer, stream in enumerate(engine.streams(sequences))
    ]
    return np.diff(reached, prepend=0.0).tolist()


def _row(tokens: Tensor) -> np.ndarray:
    return tokens.numpy().astype(np.int32)
