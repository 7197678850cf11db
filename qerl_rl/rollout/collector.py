"""What comes back from vLLM, sample by sample, until a group can be handed out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np

from qerl_rl.rollout.engine import GroupOutput, GroupRequest, Partial
from qerl_rl.rollout.routing import routed_experts_of

STOP, LENGTH, UNFINISHED = "stop", "length", "unfinished"


class Collector:
    """The samples of one group: what each had when the request came, and what the engine adds to it.

    Args: budget: tokens that a response may have. stop_tokens: those that end one; a partial response that ends so, or
    has used up its budget, is finished. no_experts: routed experts of no token, where the engine records them;
    dense_layers: how many layers, the first ones, have none.
    Raises: ValueError when the request's partial responses are not one a sample, or one is over the budget.
    """

    def __init__(
        self,
        request: GroupRequest,
        budget: int,
        stop_tokens: Collection[int],
        no_experts: np.ndarray | None = None,
        dense_layers: int = 0,
    ) -> None:
        self.partials = list(request.partials) or [Partial()] * request.samples
        lengths = [(len(partial.tokens), len(partial.log_probs)) for partial in self.partials]
        if len(lengths) != request.samples or any(tokens != scores or tokens > budget for tokens, scores in lengths):
            raise ValueError(
                f"group {request.group}: {request.samples} samples of at most {budget} tokens have partial responses "
                f"of (tokens, log_probs) {lengths}"
            )
        self.group, self.budget, self._no_experts = request.group, budget, no_experts
        self._dense_layers = dense_layers
        self._reasons = [_reason(partial.tokens, budget, stop_tokens) for partial in self.partials]

    @property
    def unfinished(self) -> list[int]:
        """Samples that have tokens left to draw."""
        return [index for index, reason in enumerate(self._reasons) if reason == UNFINISHED]

    @property
    def is_complete(self) -> bool:
        return not self.unfinished

    def finish(self, index: int, sample: Any) -> bool:
        """Add the rest of a sample, a vLLM CompletionOutput; True when it was the last of the group."""
        self.interrupt(index, sample)
        if self._no_experts is not None:
            experts = routed_experts_of(sample, self._no_experts.dtype, self._dense_layers)
            self.partials[index] = replace(self.partials[index], routed_experts=experts)
        self._reasons[index] = sample.finish_reason
        return self.is_complete

    def interrupt(self, index: int, sample: Any) -> None:
        """Add what a sample has so far; it stays unfinished."""
        old = self.partials[index]
        scores = sample.logprobs.logprobs if sample.logprobs else []
        self.partials[index] = Partial(
            np.concatenate([old.tokens, np.asarray(sample.token_ids, dtype=np.int32)]),
            np.concatenate([old.log_probs, np.asarray(scores, dtype=np.float32)]),
        )

    def output(self, *, left: bool = False) -> GroupOutput:
        """All of the group as it is now. left: it was not among the quota."""
        tokens = [partial.tokens for partial in self.partials]
        log_probs = [partial.log_probs for partial in self.partials]
        return GroupOutput(self.group, tokens, log_probs, list(self._reasons), left, self._routed_experts())

    def _routed_experts(self) -> list[np.ndarray] | None:
        if self._no_experts is None:
            return None
        finished = [reason != UNFINISHED for reason in self._reasons]
        rows = [partial.routed_experts for partial in self.partials]
        return [self._no_experts if own is None or not done else own for own, done in zip(rows, finished, strict=True)]


def _reason(tokens: np.ndarray, budget: int, stop_tokens: Collection[int]) -> str:
    if len(tokens) and int(tokens[-1]) in stop_tokens:
        return STOP
    return LENGTH if len(tokens) == budget else UNFINISHED


def unfinished_samples(engine: Any) -> dict[str, Any]:
    """The CompletionOutput so far of every request that a vLLM LLMEngine has not finished, by the name it was given.

    vLLM hands these out with an abort in its server only; streaming each token instead would cost an object a token.
    """
    from vllm.v1.engine import FinishReason

    found = {}
    for state in engine.output_processor.request_states.values():
        output = state.make_request_output([], None, FinishReason.ABORT, None)
        found[output.request_id] = output.outputs[0]
    return found
