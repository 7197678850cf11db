"""What each rank copies, sends and receives, bucket by bucket, to bring full tensors from one layout to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.holdings import Box, FullTensor, Holding, Layout
from qerl_rl.reshard.routes import Route, route
from qerl_rl.reshard.schedule import Moves, choose_senders, scheduled
from qerl_rl.reshard.summary import PlanSummary

LARGEST_SHARE = 4
"""A box that travels is at most this part of a bucket: buckets of large boxes would stay half empty."""


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


class Plan:
    """Who sends which box to whom, over all ranks: 48 bytes a box. A rank's part is worked out when asked for."""

    def __init__(
        self,
        tensors: Sequence[FullTensor],
        routes: Sequence[Route],
        source: Layout,
        target: Layout,
        moves: Moves,
        ranks_per_node: int,
        bucket_bytes: int,
    ) -> None:
        self.tensors, self.routes, self.source, self.target = tensors, routes, source, target
        self.world_size, self.ranks_per_node, self.bucket_bytes = source.world_size, ranks_per_node, bucket_bytes
        self._moves = moves
        self._dtypes = {tensor.name: tensor.dtype for tensor in tensors}

    @property
    def bucket_count(self) -> int:
        """Buckets of every rank."""
        return int(self._moves.bucket.max(initial=0)) + 1

    def for_rank(self, rank: int) -> RankPlan:
        """One rank's part."""
        moves, count = self._moves, self.bucket_count
        reader, writer = _Side(self.source, rank), _Side(self.target, rank)
        copies: list[list[Copy]] = [[] for _ in range(count)]
        sends: list[dict[int, list[Holding]]] = [{} for _ in range(count)]
        receives: list[dict[int, list[Holding]]] = [{} for _ in range(count)]
        for number in np.flatnonzero((moves.sender == rank) | (moves.receiver == rank)).tolist():
            bucket, sender, receiver = (int(each[number]) for each in (moves.bucket, moves.sender, moves.receiver))
            index = int(moves.tensor[number])
            name, box = self.tensors[index].name, self.routes[index].boxes[moves.box[number]]
            if sender == receiver:
                copies[bucket].append(Copy(reader.take(name, box, bucket), writer.take(name, box, bucket)))
            elif sender == rank:
                sends[bucket].setdefault(receiver, []).append(reader.take(name, box, bucket))
            else:
                receives[bucket].setdefault(sender, []).append(writer.take(name, box, bucket))
        finished, complete = reader.last_used(count), writer.last_used(count)
        buckets = tuple(
            Bucket(tuple(copies[number]), _by_peer(sends[number]), _by_peer(receives[number]), *ends)
            for number, ends in enumerate(zip(finished, complete, strict=True))
        )
        return RankPlan(rank, self.world_size, self._dtypes, buckets)

    def summary(self) -> PlanSummary:
        """What the whole plan costs."""
        moves, world = self._moves, self.world_size
        here = moves.sender == moves.receiver
        near = ~here & (moves.sender // self.ranks_per_node == moves.receiver // self.ranks_per_node)
        is_expert = np.array([tensor.is_expert for tensor in self.tensors], dtype=bool)[moves.tensor]
        sizes = [tensor.dtype.itemsize for tensor in self.tensors]
        missing = [int(found.missing.sum()) * size for found, size in zip(self.routes, sizes, strict=True)]

        def by_rank(ranks: np.ndarray, which: np.ndarray) -> np.ndarray:
            return np.bincount(ranks[which], moves.nbytes[which], world).astype(np.int64)

        sent, received = by_rank(moves.sender, ~here), by_rank(moves.receiver, ~here)
        return PlanSummary(
            sent=sent,
            received=received,
            copied=by_rank(moves.sender, here),
            same_node=int(moves.nbytes[near].sum()),
            across_nodes=int(moves.nbytes[~here & ~near].sum()),
            lower_bound=sum(missing),
            experts_moved=int(moves.nbytes[~here & is_expert].sum()),
            experts_lower_bound=sum(
                count for count, tensor in zip(missing, self.tensors, strict=True) if tensor.is_expert
            ),
            buckets=self.bucket_count,
            fewest_buckets=-(-int((sent + received).max()) // self.bucket_bytes),
            transfers=int((~here).sum()),
        )


class _Side:
    """What a rank holds in one layout, and which bucket uses each of its tensors last."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self._last = dict.fromkeys(layout.local_shapes(rank), 0)
        self._holdings: dict[str, list[Holding]] = {}

    def take(self, tensor: str, box: Box, bucket: int) -> Holding:
        """The rank's place of a box."""
        if tensor not in self._holdings:
            self._holdings[tensor] = self._layout.holdings_of(tensor, self._rank)
        found, *others = self._holdings[tensor]
        if others:
            found = next(holding for holding in (found, *others) if holding.box.meet(box) == box)
        self._last[found.local] = max(self._last[found.local], bucket)
        return found.narrowed(box)

    def last_used(self, buckets: int) -> list[tuple[str, ...]]:
        """Local names by the last bucket that uses them; the first for those that none does."""
        names: list[list[str]] = [[] for _ in range(buckets)]
        for name, bucket in self._last.items():
            names[bucket].append(name)
        return [tuple(each) for each in names]


def _by_peer(holdings: Mapping[int, list[Holding]]) -> dict[int, tuple[Holding, ...]]:
    return {peer: tuple(found) for peer, found in sorted(holdings.items())}


def make_plan(
    tensors: Iterable[FullTensor], source: Layout, target: Layout, *, bucket_bytes: int, ranks_per_node: int
) -> Plan:
    """Plan how `tensors` get from one layout to another over the same ranks. Every rank finds the same plan.

    A rank copies what it holds itself; the rest comes from a holder on its node, else from any. Among equal replicas
    the one that has sent the fewest bytes so far sends. Sends and receives of a rank in one bucket are at most
    bucket_bytes together.

    Raises: ConfigError when the layouts have different numbers of ranks, or no box fits into a bucket. ValueError when
    the source's ranks don't hold all of a tensor.
    """
    tensors = list(tensors)
    if source.world_size != target.world_size:
        raise ConfigError(
            f"the trainer has {source.world_size} ranks, the rollout engine {target.world_size}.",
            fix="set rollout.data_parallel so that both use all of cluster.workers",
        )
    widest = max((tensor.dtype.itemsize for tensor in tensors), default=1)
    if bucket_bytes < LARGEST_SHARE * widest:
        raise ConfigError(
            f"swap.bucket_bytes={bucket_bytes} holds no elements of {widest} bytes.",
            fix="set swap.bucket_bytes to 67108864",
        )
    known: dict[tuple, Route] = {}
    routes = []
    for tensor in tensors:
        key = (source.pattern(tensor.name), target.pattern(tensor.name), tensor.shape, tensor.dtype.itemsize)
        if key not in known:
            known[key] = route(
                tensor, source, target, largest=bucket_bytes // LARGEST_SHARE, ranks_per_node=ranks_per_node
            )
        routes.append(known[key])
    moves = scheduled(choose_senders(tensors, routes, source.world_size), source.world_size, bucket_bytes)
    return Plan(tensors, routes, source, target, moves, ranks_per_node, bucket_bytes)
