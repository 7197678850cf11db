"""Which groups of a step are learned from, when it may sample more than it needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qerl_rl.algorithms.dapo import groups_with_signal
from transfer_dock import SampleKey


class Selection:
    """The groups of one step, round by round, until `wanted` of them have rewards that differ.

    Groups are numbered from 0 in the order in which they are sampled. Where the rounds end too early, groups without
    signal fill the rest, oldest first, so that every step has the same size.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted, self.sampled = wanted, 0
        self._with_signal: list[int] = []
        self._without: list[int] = []
        self._keys: list[SampleKey] = []
        self._rewards: list[np.ndarray] = []

    @property
    def missing(self) -> int:
        """Groups that the next round has to bring."""
        return self.wanted - len(self._with_signal)

    @property
    def groups(self) -> set[int]:
        """The groups to learn from."""
        return {*self._with_signal, *self._without[: self.missing]}

    @property
    def keys(self) -> list[SampleKey]:
        """The samples to learn from."""
        groups = self.groups
        return [key for key in self._keys if key.group in groups]

    def add(self, keys: Sequence[SampleKey], rewards: np.ndarray) -> None:
        """Judge the samples of a round: their keys and rewards [S]."""
        numbers = np.array([key.group for key in keys])
        signal = groups_with_signal(torch.from_numpy(rewards), torch.from_numpy(numbers)).numpy()
        self._with_signal += np.unique(numbers[signal]).tolist()
        self._without += np.unique(numbers[~signal]).tolist()
        self._keys += keys
        self._rewards.append(rewards)
        self.sampled += len(np.unique(numbers))

    def metrics(self) -> dict[str, float]:
        """Groups sampled and the mean reward of all their samples, selected or not."""
        return {
            "sampling/groups": float(self.sampled),
            "sampling/reward_mean": float(np.concatenate(self._rewards).mean()),
        }
