"""What a rollout engine does, whatever runs behind it: groups of requests in, finished groups out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from qerl_rl.quant.noise import Noise


@dataclass(frozen=True)
class GroupRequest:
    """One prompt to be answered several times.

    prompt_tokens: int32 [prompt]. seed: of this group; sample i draws from (seed, i) alone, so it is the same whatever
    else is generated at the same time.
    """

    group: int
    prompt_tokens: np.ndarray
    samples: int
    seed: int


@dataclass(frozen=True)
class GroupOutput:
    """The finished samples of a prompt, in the order of their index.

    responses: int32 [response], with the end-of-sequence token where there is one. log_probs: float32 [response], the
    natural log-probability of each token under logits / temperature (greedy: under the logits), renormalized over the
    tokens that rollout.top_p and rollout.top_k leave. finish_reasons: `stop` (end of sequence) or `length`.
    """

    group: int
    responses: list[np.ndarray]
    log_probs: list[np.ndarray]
    finish_reasons: list[str]


class RolloutEngine(Protocol):
    """One rank's share of the engine. Every method is called on all ranks of its layout, in the same order.

    Tensor-parallel peers pass equal requests and get equal outputs; data-parallel ranks pass their own, possibly none.
    """

    def generate(
        self, requests: Sequence[GroupRequest], *, temperature: float | None = None, greedy: bool = False
    ) -> Iterator[GroupOutput]:
        """Yield each group when its last sample is finished.

        Iterate to the end on every rank, also where there are no requests: ranks that share experts step together.
        temperature: None takes rollout.temperature. greedy: the most likely token each time.
        """

    def set_adapters(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Serve these adapters from now on (exchange format, full tensors); returns the bytes this rank took over."""

    def set_noise(self, noise: Noise) -> None:
        """Put `noise` on the clean RMSNorm weights of every layer; sigma 0 takes it away."""

    def release_kv_cache(self) -> int:
        """Give the KV cache back to the system; returns the bytes freed (0 when it is away already)."""

    def restore_kv_cache(self) -> None:
        """Allocate the KV cache again, empty."""

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank holds now: `weights`, `adapters`, `kv_cache`."""
