"""The order in which prompts are given, epoch after epoch, and the place in it that a checkpoint keeps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from qerl_rl.config.errors import ConfigError
from qerl_rl.data.prompts import Prompt

_MUST_STAY = {
    "prompts": ("prompts", "the data section"),
    "seed": ("seed", "run.seed"),
    "shuffle": ("shuffle", "data.shuffle"),
    "digest": ("the digest of prompts and answers (or pairs)", "the data section, the tokenizer and the data itself"),
}
"""What must not change between a checkpoint and its resumption: how to call it, and what sets it."""


class PromptSource:
    """Gives prompts epoch after epoch, each epoch in an order of its own that only (seed, epoch) decides."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._given = 0
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._prompts)

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts; goes on with the next epoch where one ends."""
        taken: list[Prompt] = []
        while len(taken) < count:
            epoch, position = divmod(self._given, len(self._prompts))
            part = self._order_of(epoch)[position : position + count - len(taken)]
            taken.extend(self._prompts[index] for index in part)
            self._given += len(part)
        return taken

    @property
    def epochs(self) -> float:
        """Epochs given so far; 1.5 is half of the second."""
        return self._given / len(self._prompts)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: `given`, the prompts given so far, and what must not change; whole numbers only.

        The order of any epoch follows from these, so a state is equally small after the first prompt and the last.
        """
        return {
            "given": self._given,
            "prompts": len(self._prompts),
            "seed": self._seed,
            "shuffle": int(self._shuffle),
            "digest": self._digest,
        }

    @cached_property
    def _digest(self) -> int:
        """Of every prompt's content, in their order."""
        digest = hashlib.blake2b(digest_size=7)
        for prompt in self._prompts:
            for part in prompt.content:
                digest.update(len(part).to_bytes(8, "little") + part)
        return int.from_bytes(digest.digest(), "little")

    def load_state(self, state: dict[str, int]) -> None:
        """Go on where `state()` was taken.

        Raises: ConfigError when the prompts, the seed or the shuffling are not those of the checkpoint.
        """
        own = self.state()
        for name, (what, key) in _MUST_STAY.items():
            if state[name] != own[name]:
                raise ConfigError(
                    f"the checkpoint was made with {what}={state[name]}, this run has {own[name]}.",
                    fix=f"set {key} back to what the checkpoint was made with, or start anew in another run.output_dir",
                )
        self._given = state["given"]

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            count = len(self._prompts)
            shuffled = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else None
            self._order = epoch, np.arange(count) if shuffled is None else shuffled
        return self._order[1]
