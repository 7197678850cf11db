"""What each rank copies, sends and receives, bucket by bucket, to bring full tensors from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qerl_rl.layout.holdings import Holding


@dataclass(frozen=True)
class Copy:
    """The same box in two of a rank's own tensors."""

    source: Holding
    target: Holding


@dataclass(frozen=True)
class Bucket:
    """What one collective moves, seen from one rank.

    sends, receives: by the peer's rank; what a rank sends to a peer is, box for box, in the order in which the peer
    receives it. finished_sources: local names that no later bucket reads; complete_targets: local names that are whole
    once this bucket is unpacked.
    """

    copies: tuple[Copy, ...]
    sends: Mapping[int, tuple[Holding, ...]]
    receives: Mapping[int, tuple[Holding, ...]]
    finished_sources: tuple[str, ...]
    complete_targets: tuple[str, ...]


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of a plan; all ranks have equally many buckets. dtypes: what travels, by full tensor."""

    rank: int
    world_size: int
    dtypes: Mapping[str, torch.dtype]
    buckets: tuple[Bucket, ...]
