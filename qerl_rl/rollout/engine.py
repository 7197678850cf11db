"""What a rollout engine does, whatever runs behind it: groups of requests in, finished groups out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.quant.noise import Noise
from qerl_rl.quant.requantize import Survival
from qerl_rl.rollout.weight_memory import ByteStore


@dataclass(frozen=True)
class Partial:
    """What a sample has of its response already: tokens int32 [n] and their log_probs float32 [n]; maybe nothing.

    routed_experts: of a finished one, as in GroupOutput. One that goes on is computed anew from its first token.
    """

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    log_probs: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    routed_experts: np.ndarray | None = None


@dataclass(frozen=True)
class GroupRequest:
    """One prompt to be answered several times.

    prompt_tokens: int32 [prompt]. seed: of this group; sample i draws from (seed, i) and the length of its partial
    response alone, so it is the same whatever else is generated at the same time. partials: one a sample, from which it
    goes on; empty where none has begun. must_finish: it is waited for, whatever the quota.
    """

    group: int
    prompt_tokens: np.ndarray
    samples: int
    seed: int
    partials: Sequence[Partial] = ()
    must_finish: bool = False


@dataclass(frozen=True)
class GroupOutput:
    """The samples of a prompt, in the order of their index, with what they had before.

    responses: int32 [response], with the end-of-sequence token where there is one. log_probs: float32 [response], the
    natural log-probability of each token under logits / temperature (greedy: under the logits), renormalized over the
    tokens that rollout.top_p, top_k and min_p leave; those of a partial response are as they were given.
    finish_reasons: `stop` (end of sequence), `length` or, in a group that is `left`, `unfinished`. left: it was not
    among the quota; each of its samples can go on as a Partial of another request, finished or not.
    routed_experts: of an engine that records them, uint8 (int16 above 256 experts) [prompt + response - 1, layers, k]:
    the experts that each layer chose for each token, in the model's numbering; the last token sampled was never
    computed. An unfinished sample has no rows.
    """

    group: int
    responses: list[np.ndarray]
    log_probs: list[np.ndarray]
    finish_reasons: list[str]
    left: bool = False
    routed_experts: list[np.ndarray] | None = None


class LiveTarget(Protocol):
    """Tensors of a serving engine that another policy's are written to, in the shards of the engine's own layout."""

    @property
    def locals(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of each tensor that this rank holds; all have to be written."""

    def write(self, local: str) -> torch.Tensor:
        """The tensor to fill. Raises: KeyError when the engine holds none of this name."""

    def complete(self, local: str) -> None:
        """All of it has been written."""

    def finish(self) -> int:
        """All are complete: from now on they are what the engine serves. Returns the bytes written.

        Collective over the ranks of the engine. Raises: RuntimeError when tensors are missing.
        """


class RolloutEngine(Protocol):
    """One rank's share of the engine. Every method is called on all ranks of its layout, in the same order.

    Tensor-parallel peers pass equal requests and get equal outputs; data-parallel ranks pass their own, possibly none.
    """

    def generate(
        self,
        requests: Sequence[GroupRequest],
        *,
        temperature: float | None = None,
        greedy: bool = False,
        quota: int | None = None,
    ) -> Iterator[GroupOutput]:
        """Yield each group when its last sample is finished.

        Iterate to the end on every rank, also where there are no requests: ranks that share experts step together.
        temperature: None takes rollout.temperature. greedy: the most likely token each time. quota: stop when this many
        of this rank's groups are complete (`Quota` says which), then yield the others as they are; None waits for all.
        """

    def set_adapters(self, tensors: Mapping[str, torch.Tensor], step: int = 0) -> int:
        """Serve these adapters from now on (exchange format, full tensors); returns the bytes this rank took over.

        step: merged weights are rounded by the random numbers of this step.
        """

    def adapter_target(self, step: int = 0) -> LiveTarget:
        """Where another policy's adapters go, in this rank's shards (exchange format); end it with its `finish`.

        step: merged weights are rounded by the random numbers of this step.
        """

    def weight_target(self) -> LiveTarget:
        """Where another policy's weights go, in this rank's shards (full training); end it with its `finish`.

        A tensor has the shape of the engine's parameter before its kernels pack it, and of a quantized one there are
        the parts. Noise is taken away.
        """

    def score(self, tokens: Sequence[np.ndarray], *, temperature: float | None = None) -> list[np.ndarray]:
        """Log-probs of given tokens, float32 [n - 1] for int32 [n]: of each but the first, given those before it.

        As `generate` would give them with no token left out. Collective like it: ranks that share
        experts step together, also where they score nothing. temperature: None takes rollout.temperature, 0 the logits.
        """

    @property
    def description(self) -> str:
        """How this engine runs the checkpoint's formats and its adapters, in a line."""

    @property
    def survival(self) -> Survival | None:
        """How much of the adapters the last merge kept; None where adapters act beside the weights."""

    def set_noise(self, noise: Noise) -> None:
        """Put `noise` on the clean RMSNorm weights of every layer; sigma 0 takes it away."""

    def lendable_experts(self) -> list[StoredExperts]:
        """Frozen weights that others of this process may read in place, as long as the engine exists."""

    def lend(self, nbytes: Mapping[str, int]) -> None:
        """Keep these weights (bytes that their readers need not store, by the name of the full tensor) in memory."""

    def release_kv_cache(self) -> int:
        """Give the KV cache back to the system; returns the bytes freed (0 when it is away already)."""

    def restore_kv_cache(self) -> None:
        """Allocate the KV cache again, empty."""

    def release_weights(self, store: ByteStore | None) -> int:
        """Let the weights leave memory; returns the bytes freed (0 when they are away already).

        store: where they stay meanwhile (always the same). None gives them up: `weight_target` has to bring all of
        them, and its `finish` ends the release; `restore_weights` is not called then.
        """

    def restore_weights(self) -> None:
        """Bring the weights back, bit for bit."""

    def held_bytes(self) -> dict[str, int]:
        """Bytes this rank holds now: `weights`, `shared` (those that are lent), `adapters`, `kv_cache`."""
