"""The keys of a launch file that say what is profiled."""

from __future__ import annotations

from dataclasses import dataclass, field

ALL = "all"
STAGES = (
    "rollout",
    "swap_to_rollout",
    "swap_to_train",
    "old_log_probs",
    "reference_log_probs",
    "values",
    "reward",
    "update",
    "critic_update",
)
"""What a worker can be profiled in; docs/profiling.md says what each is."""


@dataclass(frozen=True)
class ProfilerConfig:
    """Traces of some stages of some steps on some ranks, in run.output_dir/profile (docs/profiling.md)."""

    steps: list[int] = field(default_factory=list)
    """Steps to record, counted from 1; empty records nothing."""
    stages: list[str] = field(default_factory=lambda: ["update"])
    """Of rollout, swap_to_rollout, swap_to_train, old_log_probs, reference_log_probs, values, reward (of a reward model
    on the cards), update, critic_update; or `all` for those that the run has."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Workers to record."""
    kind: str = "torch"
    """torch (a Chrome trace) or msprof (Ascend's profiler: a folder that MindStudio Insight opens)."""
    memory: bool = False
    """Record what is allocated and freed."""
    shapes: bool = False
    """Record the shapes of operators' inputs."""
    stacks: bool = False
    """Record the Python source of each operator's call, which slows the stage down."""
    level: str = "level1"
    """Of msprof: none, level0 (kernels), level1 (and CANN's calls, collectives, aic_metrics) or level2 (and AI CPU)."""
    aic_metrics: str = "pipe_utilization"
    """Of msprof from level1 on: counters of the AI cores. none, pipe_utilization, arithmetic_utilization, memory,
    memory_l0, memory_ub, resource_conflict_ratio, l2_cache or memory_access."""
    export: str = "text"
    """Of msprof: text (JSON and CSV files) or db (one SQLite file)."""
    analyse: bool = True
    """Of msprof: have the raw data turned into what is opened when the stage ends; off, msprof does it later."""

    def records(self, step: int, stage: str, rank: int) -> bool:
        """Whether that stage of that step is recorded on that rank."""
        return step in self.steps and rank in self.ranks and (stage in self.stages or ALL in self.stages)
