"""After a swap both engines score the same tokens: weights that arrived wrong, or were packed wrong, show at once.

The checksum ends where the engine takes its tensors over; what its kernels make of them only its own log-probs tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from qerl_rl.config.schema import Config
from qerl_rl.train.engine import TrainEngine
from qerl_rl.train.samples import Samples

SEQUENCES, TOKENS = 4, 64
TOLERANCES = {0: 0.3, 8: 0.8, 4: 1.5}
"""By the bits that quant.format rounds to (0: to none): about twice what sound swaps were measured to differ by."""
BITS = {"none": 0, "w8a8": 8, "mxfp8": 8}
"""Of other formats 4."""


class CanaryError(RuntimeError):
    """The engine's log-probs are not those of the policy."""


class Scorer(Protocol):
    """What the canary asks of the rollout engine."""

    def score(self, tokens: Sequence[np.ndarray], *, temperature: float | None = None) -> list[np.ndarray]:
        """Log-probs of each token but the first: float32 [n - 1] for int32 [n]."""


class Canary:
    """Scores SEQUENCES of up to TOKENS random tokens of the vocabulary, the same in every run of a seed; collective.

    Whether a model finds them likely does not matter: each of them is one number of every layer's making.
    """

    def __init__(self, train: TrainEngine, rollout: Scorer, config: Config) -> None:
        self._train, self._rollout, self._config = train, rollout, config
        shape = (SEQUENCES, min(TOKENS, config.model.max_length - 1))
        vocabulary = train.architecture.vocabulary_size
        self._tokens = np.random.default_rng([config.run.seed, *b"canary"]).integers(0, vocabulary, shape)
        self._expected: torch.Tensor | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether the trainer has scored, and the engine has not."""
        return self._expected is not None

    def ask_trainer(self) -> None:
        """Score by the trainer, whose state must be in memory."""
        samples = Samples(list(self._tokens), [self._tokens.shape[1] - 1] * SEQUENCES)
        scores = self._train.log_probs(samples)
        ranks, device = dist.get_world_size(), self._train.device
        # The output ranks of the data-parallel replicas have equal scores.
        first = torch.tensor(ranks if scores is None else dist.get_rank(), device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        values = torch.zeros(SEQUENCES * (self._tokens.shape[1] - 1), device=device)
        if scores is not None:
            values.copy_(torch.from_numpy(np.concatenate(scores.log_probs)))
        dist.broadcast(values, int(first))
        self._expected = values.cpu()

    def compare(self, step: int) -> float:
        """Score by the engine, which must serve the policy without noise, with its KV cache in memory.

        Returns: the largest mean |difference| of all ranks, in nats a token.
        Raises: CanaryError, on all ranks, when it reaches the tolerance; RuntimeError before `ask_trainer`.
        """
        if self._expected is None:
            raise RuntimeError("compare() before ask_trainer()")
        rows = self._rollout.score([row.astype(np.int32) for row in self._tokens])
        found = torch.from_numpy(np.concatenate(rows))
        own = (found - self._expected).abs().mean().nan_to_num(nan=torch.inf)
        self._expected = None
        gaps = torch.zeros(dist.get_world_size(), device=self._train.device)
        gaps[dist.get_rank()] = own
        dist.all_reduce(gaps)
        worst = float(gaps.max())
        if worst >= self.tolerance:
            raise CanaryError(_message(gaps.tolist(), step, self.tolerance))
        return worst

    @property
    def tolerance(self) -> float:
        """From what mean |difference| on a swap counts as broken."""
        return self._config.swap.canary_tolerance or TOLERANCES[BITS.get(self._config.quant.format, 4)]


def _message(gaps: Sequence[float], step: int, tolerance: float) -> str:
    wrong = {rank: gap for rank, gap in enumerate(gaps) if gap >= tolerance}
    shown = ", ".join(f"{gap:.3f} on rollout rank {rank}" for rank, gap in list(wrong.items())[:4])
    return (
        f"swap of step {step}: the engine's log-probs of fixed tokens differ from the trainer's by {shown} of "
        f"{len(gaps)} (mean nats a token; from {tolerance:g} on it counts as broken). Set swap.checksum to always and "
        "run again: if it raises, bytes were lost on the way; if not, the engine computes in another way with what it "
        "got than the trainer (`python -m qerl_rl verify` compares both with transformers), or their arithmetic alone "
        "differs as much: then set swap.canary_tolerance above that"
    )
