"""Scoring many samples, none of which can hang or end the run."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qerl_rl.rewards.load import IN_PROCESS, load_reward
from qerl_rl.rewards.process import SampleFailure, ScoringProcess

Sample = tuple[str, str, str]
"""(prompt, response, answer)"""


@dataclass(frozen=True)
class Scores:
    """What a list of samples got."""

    values: np.ndarray
    """[S] float32, in the order of the samples; 0 for one that failed."""
    failures: dict[int, str]
    """Why a sample failed, by its index."""


class RewardScorer:
    """The reward function `name`, run in `processes` processes with `timeout_s` seconds a sample.

    A sample whose function raises, returns no finite number, hangs or ends its process scores 0.0; its process is
    replaced and no other sample notices. Rewards in `load.IN_PROCESS` run right here. Threads may share a scorer.
    Close it (or use it as a context manager) when done; its processes also end when their owner does.

    Raises: ConfigError for a name that `load_reward` refuses; RuntimeError from `score` when a process can't start.
    """

    def __init__(self, name: str, processes: int, timeout_s: float) -> None:
        self._function = load_reward(name)
        self._idle: queue.SimpleQueue[ScoringProcess] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[ScoringProcess] = []
        if name not in IN_PROCESS:
            self._threads = ThreadPoolExecutor(processes, thread_name_prefix="reward")
            self._processes = [ScoringProcess(name, timeout_s) for _ in range(processes)]
            for process in self._processes:
                self._idle.put(process)
        self.failed_samples = 0
        """Samples that failed so far."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The rewards of the samples, in their order; takes at most timeout_s a sample and process."""
        score_one = self._score_here if self._threads is None else self._score_in_process
        outcomes = list((self._threads.map if self._threads else map)(score_one, samples))
        failures = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        self.failed_samples += len(failures)
        values = [0.0 if isinstance(outcome, str) else outcome for outcome in outcomes]
        return Scores(np.asarray(values, dtype=np.float32), failures)

    def close(self) -> None:
        """End the processes, after the samples being scored right now; a `score` still running is cancelled."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()
        self._processes = []

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_here(self, sample: Sample) -> float | str:
        return self._function(*sample)

    def _score_in_process(self, sample: Sample) -> float | str:
        process = self._idle.get()
        try:
            return process.score(*sample)
        except SampleFailure as failure:
            return str(failure)
        finally:
            self._idle.put(process)
