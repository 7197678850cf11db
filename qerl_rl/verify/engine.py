"""The rollout engine against the trainer: log-probs of what it samples, speeds, and the layers where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from qerl_rl.algorithms.mismatch import rollout_mismatch
from qerl_rl.config.schema import LoraConfig, RolloutConfig
from qerl_rl.rollout.engine import GroupOutput, GroupRequest
from qerl_rl.train.samples import Samples
from qerl_rl.verify.policy import FrozenPolicy
from qerl_rl.verify.quantized import mean_divergence

if TYPE_CHECKING:
    from qerl_rl.rollout.vllm_engine import VllmEngine

SAMPLES, RESPONSE_TOKENS = 4, 32
"""Of each prompt."""


@dataclass(frozen=True)
class EngineFigures:
    """load_seconds; tokens a second of the first generation and of the same again; rollout_vs_train/* by name."""

    load_seconds: float
    first_speed: float
    steady_speed: float
    mismatch: dict[str, float]
    added: list[float]
    """By layer, nats that KL(trainer || trainer that goes on from the engine's stream) grows by; empty if not asked."""


def measure_engine(
    folder: Path, policy: FrozenPolicy, prompts: Sequence[Tensor], sequences: Sequence[Tensor], *, by_layer: bool
) -> EngineFigures:
    """Load vLLM on `folder`, which `policy` has loaded too, and let it answer the int64 [n] prompts.

    sequences: int64 [n] each, what both read for the figures by layer.
    """
    begin = perf_counter()
    # It imports vLLM, which takes seconds.
    from qerl_rl.rollout.vllm_engine import VllmEngine

    longest = max(map(len, [*prompts, *sequences])) + RESPONSE_TOKENS
    options = RolloutConfig(
        data_parallel=1,
        expert_parallel=False,
        max_response_tokens=RESPONSE_TOKENS,
        max_sequences=max(128, len(sequences)),
        # All sequences fit into one prefill, which `_added_by_layer` relies on.
        max_batched_tokens=max(2048, longest, sum(map(len, sequences))),
        # A cached prefix is not computed, and would leave no trace in the layers.
        prefix_caching=False,
    )
    no_adapters = LoraConfig(attention=False, experts=False, shared_experts=False)
    engine = VllmEngine(folder, options, no_adapters, max_length=longest, seed=0)
    load_seconds = perf_counter() - begin
    speeds, outputs = [], []
    requests = [GroupRequest(i, _row(prompt), SAMPLES, seed=i) for i, prompt in enumerate(prompts)]
    for _ in range(2):
        begin = perf_counter()
        outputs = sorted(engine.generate(requests), key=lambda output: output.group)
        speeds.append(sum(len(row) for output in outputs for row in output.responses) / (perf_counter() - begin))
    mismatch = rollout_mismatch(*_log_probs(policy, prompts, outputs))
    added = _added_by_layer(engine, policy, sequences) if by_layer else []
    return EngineFigures(load_seconds, speeds[0], speeds[1], mismatch, added)


def _row(tokens: Tensor) -> np.ndarray:
    return tokens.numpy().astype(np.int32)


def _log_probs(
    policy: FrozenPolicy, prompts: Sequence[Tensor], outputs: Sequence[GroupOutput]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The engine's log-probs of all responses, and the trainer's."""
    tokens, lengths, sampled = [], [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        for response, log_probs in zip(output.responses, output.log_probs, strict=True):
            tokens.append(np.concatenate([prompt.numpy(), response]).astype(np.int64))
            lengths.append(len(response))
            sampled.append(log_probs)
    return sampled, policy.log_probs(Samples(tokens, lengths))


def _added_by_layer(engine: VllmEngine, policy: FrozenPolicy, sequences: Sequence[Tensor]) -> list[float]:
    """What each layer of the engine adds to the divergence, from its residual streams patched into the trainer."""
    from qerl_rl.rollout.layer_streams import layer_streams

    # All prompts in one prefill, whose tokens lie one prompt after another: it is the first step of the engine.
    with layer_streams(engine) as seen:
        list(engine.generate([GroupRequest(i, _row(sequence), 1, seed=0) for i, sequence in enumerate(sequences)]))
    streams = [steps[0] for steps in seen]
    exact = policy.logits(sequences)
    if len(streams[0]) != len(exact):
        raise RuntimeError(f"the engine's first step computed {len(streams[0])} tokens of {len(exact)}")
    reached = [
        mean_divergence(exact, policy.logits_from(sequences, layer + 1, stream)) for layer, stream in enumerate(streams)
    ]
    return np.diff(reached, prepend=0.0).tolist()
