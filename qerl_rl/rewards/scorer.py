"""Scoring many samples, none of which can hang, fill or end the run."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from qerl_rl.config.schema import RewardConfig
from qerl_rl.rewards.load import IN_PROCESS, RewardFunction, load_rewards
from qerl_rl.rewards.process import SampleFailure, ScoringProcess

Sample = tuple[str, str, str]
"""(prompt, response, answer)"""


@dataclass(frozen=True)
class Scores:
    """What a list of S samples got."""

    values: np.ndarray
    """[S] float32, in the order of the samples: the weighted sum of what each function gave."""
    parts: dict[str, np.ndarray]
    """[S] float32 for each function, before its weight; 0 where it failed."""
    failures: dict[int, str]
    """Which function failed on a sample and why, by the sample's index."""

    def plus(self, name: str, weight: float, values: np.ndarray, failures: Mapping[int, str]) -> Scores:
        """These and a further part [S], which counts `weight` times."""
        total = self.values.astype(np.float64) + weight * values.astype(np.float64)
        joined = _joined(self.failures, name, failures)
        return Scores(total.astype(np.float32), self.parts | {name: values}, joined)


def _joined(failures: Mapping[int, str], name: str, further: Mapping[int, str]) -> dict[int, str]:
    """The reasons of both, by the sample's index; `further` are those of the function `name`."""
    added = {
        index: "; ".join(filter(None, [failures.get(index), f"{name}: {reason}"])) for index, reason in further.items()
    }
    return {**failures, **added}


class RewardScorer:
    """The functions of the section `reward`, run in `reward.workers` processes within its limits.

    A function that raises, returns no finite number, hangs, ends its process or eats memory scores 0.0 for that sample;
    its process is replaced, and neither the sample's other functions nor other samples notice. Rewards in
    `load.IN_PROCESS` run right here. Threads may share a scorer. Close it (or use it as a context manager) when done;
    its processes also end when their owner does.

    Args: companions: dotted paths of further functions that `apply` shall be able to run.
    Raises: ConfigError for a name that `load_reward` refuses; RuntimeError from `score` when a process can't start.
    """

    def __init__(self, reward: RewardConfig, companions: Iterable[str] = ()) -> None:
        self._weights = reward.weights
        functions = load_rewards(reward)
        self._here: dict[str, RewardFunction] = {name: functions[name] for name in functions if name in IN_PROCESS}
        apart = [name for name in dict.fromkeys([*functions, *companions]) if name not in self._here]
        self._idle: queue.SimpleQueue[ScoringProcess] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None
        self._processes: list[ScoringProcess] = []
        if apart:
            self._threads = ThreadPoolExecutor(reward.workers, thread_name_prefix="reward")
            self._processes = [
                ScoringProcess(apart, reward.timeout_s, reward.memory_bytes) for _ in range(reward.workers)
            ]
            for process in self._processes:
                self._idle.put(process)
        self.failed_samples = 0
        """Samples that a function failed on so far."""

    def score(self, samples: Sequence[Sample]) -> Scores:
        """The rewards of the samples; takes at most timeout_s a sample and function, shared by the processes."""
        total = np.zeros(len(samples))
        parts: dict[str, np.ndarray] = {}
        failures: dict[int, str] = {}
        for name, weight in self._weights.items():
            values, failed = self.apply(name, samples)
            parts[name] = values
            total += weight * values.astype(np.float64)
            failures = _joined(failures, name, failed)
        self.failed_samples += len(failures)
        return Scores(total.astype(np.float32), parts, failures)

    def apply(self, name: str, samples: Sequence[Sample]) -> tuple[np.ndarray, dict[int, str]]:
        """What the function `name` gives: [S] float32, 0 for a sample it failed on, and why it failed by index."""
        if name in self._here:
            return np.array([self._here[name](*sample) for sample in samples], dtype=np.float32), {}
        assert self._threads is not None
        outcomes = list(self._threads.map(lambda sample: self._score_in_process(name, sample), samples))
        failures = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, str)}
        values = [0.0 if isinstance(outcome, str) else outcome for outcome in outcomes]
        return np.array(values, dtype=np.float32), failures

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

    def _score_in_process(self, name: str, sample: Sample) -> float | str:
        process = self._idle.get()
        try:
            return process.score(name, *sample)
        except SampleFailure as failure:
            return str(failure)
        finally:
            self._idle.put(process)
