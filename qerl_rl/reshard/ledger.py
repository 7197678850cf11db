"""What a swap did: its stages in order with seconds, the bytes it moved, the bytes each engine holds afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from qerl_rl.quant.requantize import Survival

POLICY, CRITIC, REWARD_MODEL = "train", "critic", "reward_model"
"""The models that the trainer runs: names of their phases, and of what they hold."""


@dataclass
class SwapReport:
    """One phase change on one rank.

    phase: the phase that begins, `rollout` or the name of a model. seconds: by stage, in the order run. moved_bytes:
    bytes written into the rollout engine: adapters, or the weights that they were merged into. survival: how much of
    the adapters this rank's merged weights kept, None where nothing was merged. released_bytes: bytes by kind that left
    memory. held_bytes: bytes by engine and kind now in memory.
    """

    phase: str
    seconds: dict[str, float] = field(default_factory=dict)
    moved_bytes: int = 0
    survival: Survival | None = None
    released_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = perf_counter()
        yield
        self.seconds[name] = perf_counter() - begin

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def line(self) -> str:
        """One line for the log: seconds by stage, bytes moved, released and held."""
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        parts = [f"swap to {self.phase} {self.total_seconds:.2f} s ({stages})"]
        if self.moved_bytes:
            parts.append(f"moved {mebibytes(self.moved_bytes)}")
        for title, kinds in (("released", self.released_bytes), ("holds", self.held_bytes)):
            if kinds:
                parts.append(f"{title} " + ", ".join(f"{kind} {mebibytes(count)}" for kind, count in kinds.items()))
        return " | ".join(parts)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
