"""Executes one rank's part of a plan: pack, send, copy, unpack, bucket by bucket, in the type that travels.

While bucket i is on its way, bucket i + 1 is packed and what stays on the rank is copied. Besides the tensors of both
sides there are two buckets of staging, which the exchange keeps from one swap to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import torch

from qerl_rl.layout.holdings import Holding
from qerl_rl.reshard.exchange import Exchange, Messages
from qerl_rl.reshard.plan import Bucket, RankPlan

STAGES = ("pack", "copy", "wait", "unpack", "finish")


class Source(Protocol):
    """Where the rank's tensors come from."""

    def read(self, local: str) -> torch.Tensor:
        """The rank's tensor; asked again for each bucket that reads it."""

    def finished(self, local: str) -> None:
        """No later bucket reads it: it may be freed or written away."""


class Target(Protocol):
    """Where the rank's tensors go."""

    def write(self, local: str) -> torch.Tensor:
        """The tensor to fill (allocated at its first use); asked again for each bucket that writes it."""

    def complete(self, local: str) -> None:
        """All of it is there: it may be packed and handed to the kernel."""


@dataclass
class TransferReport:
    """What one rank moved, in bytes of the types that travel, and its seconds by stage.

    Stages: pack (with what the source does to give a tensor), copy (within the rank), wait (for peers), unpack, finish
    (what source and target do with tensors that are through). On a card they are the host's seconds: it runs ahead.
    """

    copied_bytes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    staging_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _stages: list[str] = field(default_factory=list, repr=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside for this stage, not for the one around it."""
        self._stages.append(name)
        begin = perf_counter()
        yield
        seconds = perf_counter() - begin
        self._stages.pop()
        self.seconds[name] += seconds
        for outer in self._stages[-1:]:
            self.seconds[outer] -= seconds


@torch.no_grad()
def transfer(plan: RankPlan, source: Source, target: Target, exchange: Exchange) -> TransferReport:
    """Fill `target` from the `source` of all ranks; collective.

    A tensor of another float type than the plan's is rounded to that before it moves, or stays, so that all replicas of
    a target are equal. The first buckets' peers may still be at work with what was before: the exchange waits for them.

    Raises: TransferError when a peer does not come in time, or fails.
    """
    report = TransferReport()
    exchange.open([_messages(bucket, plan.dtypes) for bucket in plan.buckets])
    report.staging_bytes = exchange.staging_bytes
    steps = [_Step(number, bucket, plan.dtypes, source, target, report) for number, bucket in enumerate(plan.buckets)]
    for step in steps[:1]:
        step.send(exchange)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        # Copies first: a source that this bucket reads may end with what the next one sends of it.
        step.copy()
        if following is not None:
            following.send(exchange)
        step.receive(exchange)
        step.end()
    with report.stage("wait"):
        exchange.close()
    return report


class _Step:
    """One bucket on its way."""

    def __init__(
        self,
        number: int,
        bucket: Bucket,
        dtypes: Mapping[str, torch.dtype],
        source: Source,
        target: Target,
        report: TransferReport,
    ) -> None:
        self._number, self._bucket, self._dtypes, self._report = number, bucket, dtypes, report
        reads = (*(copy.source for copy in bucket.copies), *_all(bucket.sends))
        writes = (*(copy.target for copy in bucket.copies), *_all(bucket.receives))
        self._sources = _Borrowed(source.read, source.finished, reads, bucket.finished_sources, report)
        self._targets = _Borrowed(target.write, target.complete, writes, bucket.complete_targets, report)

    def send(self, exchange: Exchange) -> None:
        with self._report.stage("wait"):
            memory = exchange.outgoing(self._number)
        with self._report.stage("pack"):
            for peer, message in memory.items():
                for holding, packed in _boxes(message, self._bucket.sends[peer], self._dtypes):
                    packed.copy_(self._sources.take(holding))
                    self._sources.used(holding)
                    self._report.sent_bytes += packed.nbytes
            exchange.start(self._number)

    def copy(self) -> None:
        with self._report.stage("copy"):
            for copy in self._bucket.copies:
                travels = self._dtypes[copy.source.tensor]
                _fill(self._targets.take(copy.target), self._sources.take(copy.source), travels)
                self._report.copied_bytes += copy.source.box.elements * travels.itemsize
                self._sources.used(copy.source)
                self._targets.used(copy.target)

    def receive(self, exchange: Exchange) -> None:
        with self._report.stage("wait"):
            memory = exchange.incoming(self._number)
        with self._report.stage("unpack"):
            for peer, message in memory.items():
                for holding, packed in _boxes(message, self._bucket.receives[peer], self._dtypes):
                    self._targets.take(holding).copy_(packed)
                    self._targets.used(holding)
                    self._report.received_bytes += packed.nbytes
            exchange.release(self._number)

    def end(self) -> None:
        self._sources.end()
        self._targets.end()


class _Borrowed:
    """A rank's tensors during one bucket: asked for at the first use, let go of and reported at the last one."""

    def __init__(
        self,
        ask: Callable[[str], torch.Tensor],
        done: Callable[[str], None],
        uses: Iterable[Holding],
        ending: Sequence[str],
        report: TransferReport,
    ) -> None:
        self._ask, self._done, self._report = ask, done, report
        self._uses = Counter(holding.local for holding in uses)
        self._ending = dict.fromkeys(ending)
        self._tensors: dict[str, torch.Tensor] = {}

    def take(self, holding: Holding) -> torch.Tensor:
        """The box of a holding, in place."""
        if holding.local not in self._tensors:
            self._tensors[holding.local] = self._ask(holding.local)
        return holding.take(self._tensors[holding.local])

    def used(self, holding: Holding) -> None:
        """One use less; views of the tensor must be dropped by then."""
        local = holding.local
        self._uses[local] -= 1
        if not self._uses[local]:
            del self._tensors[local]
            if local in self._ending:
                self._finish(local)

    def end(self) -> None:
        """The names that end with this bucket and that it did not touch."""
        for local in list(self._ending):
            self._finish(local)

    def _finish(self, local: str) -> None:
        del self._ending[local]
        with self._report.stage("finish"):
            self._done(local)


def _fill(place: torch.Tensor, box: torch.Tensor, travels: torch.dtype) -> None:
    # A wider type would else get digits that no other rank's copy has.
    place.copy_(box if place.dtype == travels else box.to(travels))


def _all(parts: Mapping[int, tuple[Holding, ...]]) -> list[Holding]:
    return [holding for holdings in parts.values() for holding in holdings]


def _messages(bucket: Bucket, dtypes: Mapping[str, torch.dtype]) -> Messages:
    def sizes(parts: Mapping[int, tuple[Holding, ...]]) -> dict[int, int]:
        return {peer: _end(holdings, dtypes) for peer, holdings in parts.items() if holdings}

    return Messages(sizes(bucket.sends), sizes(bucket.receives))


def _places(holdings: Iterable[Holding], dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[Holding, int, int]]:
    """Where each box lies in a message: first byte, and the one behind the last. Both sides reckon alike."""
    end = 0
    for holding in holdings:
        item_size = dtypes[holding.tensor].itemsize
        # A view as its type needs this much; more would make the message larger than the bucket was planned.
        begin = -(-end // item_size) * item_size
        end = begin + holding.box.elements * item_size
        yield holding, begin, end


def _end(holdings: Iterable[Holding], dtypes: Mapping[str, torch.dtype]) -> int:
    return max(end for _, _, end in _places(holdings, dtypes))


def _boxes(
    memory: torch.Tensor, holdings: Iterable[Holding], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[Holding, torch.Tensor]]:
    """Each box of a message, as a view of it."""
    for holding, begin, end in _places(holdings, dtypes):
        yield holding, memory[begin:end].view(dtypes[holding.tensor]).view(holding.box.shape)
