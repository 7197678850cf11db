"""What a swap did: its stages in order with seconds, the bytes it moved, the bytes each engine holds afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from qerl_rl.quant.requantize import Survival

POLICY, CRITIC, REWARD_MODEL = "train", "critic", "reward_model"
"""The models that the trainer runs: names of their phases, and of what they hold."""


@dataclass
class Traffic:
    """What one rank's part of a transfer came to.

    copied_bytes: within the rank. sent_bytes: to others. same_node_bytes, across_nodes_bytes: received, by the link
    that they took. staging_bytes: memory for buckets. over_lower_bound: bytes that all ranks sent over those that their
    engines needed and did not have. seconds: by stage of the transfer, with `checksum` where there was one.
    """

    copied_bytes: int
    sent_bytes: int
    same_node_bytes: int
    across_nodes_bytes: int
    staging_bytes: int
    over_lower_bound: float
    seconds: dict[str, float]

    def line(self) -> str:
        """For the log."""
        parts = [f"copied {mebibytes(self.copied_bytes)}", f"same node {mebibytes(self.same_node_bytes)}"]
        if self.across_nodes_bytes:
            parts.append(f"across nodes {mebibytes(self.across_nodes_bytes)}")
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items() if seconds >= 0.005)
        return f"{', '.join(parts)}; {self.over_lower_bound:.2f} of the lower bound{f'; {stages}' if stages else ''}"


@dataclass
class SwapReport:
    """One phase change on one rank.

    phase: the phase that begins, `rollout` or the name of a model. seconds: by stage, in the order run. moved_bytes:
    bytes written into the rollout engine: adapters, or the weights that they were merged into, or all weights. traffic:
    how they came there; None where nothing moved. checksum_bytes: compared with what was sent, of both sides; 0 where
    none was due. canary: mean |difference| of both engines' log-probs on fixed tokens; None where none was due.
    survival: how much of the adapters this rank's merged weights kept, None where nothing was merged. released_bytes:
    bytes by kind that left memory. held_bytes: bytes by engine and kind now in memory. device_bytes: what this process
    has of its device's memory by then, as the allocator counts (blocks); on CPU its resident set, whatever that is for.
    """

    phase: str
    seconds: dict[str, float] = field(default_factory=dict)
    moved_bytes: int = 0
    traffic: Traffic | None = None
    checksum_bytes: int = 0
    canary: float | None = None
    survival: Survival | None = None
    released_bytes: dict[str, int] = field(default_factory=dict)
    held_bytes: dict[str, int] = field(default_factory=dict)
    device_bytes: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside for this stage; one may come in several parts."""
        begin = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begin

    def release(self, freed: Mapping[str, int]) -> None:
        """Add bytes that left, by kind."""
        for kind, count in freed.items():
            self.released_bytes[kind] = self.released_bytes.get(kind, 0) + count

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def line(self) -> str:
        """One line for the log: seconds by stage, bytes moved, what checks found, bytes released and held."""
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.seconds.items())
        parts = [f"swap to {self.phase} {self.total_seconds:.2f} s ({stages})"]
        if self.moved_bytes:
            how = f" ({self.traffic.line()})" if self.traffic else ""
            parts.append(f"moved {mebibytes(self.moved_bytes)}{how}")
        if self.checksum_bytes:
            parts.append(f"checksum of {mebibytes(self.checksum_bytes)} agrees")
        if self.canary is not None:
            parts.append(f"canary {self.canary:.3f} nats")
        for title, kinds in (("released", self.released_bytes), ("holds", self.held_bytes)):
            if kinds:
                parts.append(f"{title} " + ", ".join(f"{kind} {mebibytes(count)}" for kind, count in kinds.items()))
        return " | ".join(parts)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
