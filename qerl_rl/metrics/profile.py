"""Which stages of which steps a worker has recorded, and under which names."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qerl_rl.config.schema import Config

Method = TypeVar("Method", bound=Callable[..., Any])


class StageProfiler:
    """Records the stages of a worker that the launch file asks for; `step` is the one that the loop is at.

    A trace is named step_STEP_STAGE_rank_RANK in run.output_dir/profile; a stage's second time in a step has _2 behind
    that, and so on.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self.step = 0
        self._config, self._rank = config, rank
        self._recorded: Counter[str] = Counter()

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        """Record what runs inside, if it is one of those stages."""
        profiler = self._config.profiler
        if not profiler.records(self.step, stage, self._rank):
            yield
            return
        # What a run that profiles nothing need not import.
        from qerl_rl.platform import detect
        from qerl_rl.platform.profilers import profiled

        name = f"step_{self.step:08d}_{stage}_rank_{self._rank:05d}"
        self._recorded[name] += 1
        if self._recorded[name] > 1:
            name = f"{name}_{self._recorded[name]}"
        folder, label = Path(self._config.run.output_dir, "profile"), f"{stage} of step {self.step}"
        with profiled(detect(self._config.train.device), profiler, folder, name, label):
            yield


def stage(name: str) -> Callable[[Method], Method]:
    """Make a method of an object with a `profiler` (a StageProfiler) the stage of that name."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
            with self.profiler.stage(name):
                return method(self, *arguments, **options)

        return recorded  # type: ignore[return-value]

    return decorate
