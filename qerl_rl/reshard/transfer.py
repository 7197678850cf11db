"""Executes one rank's part of a plan: pack, send, copy, unpack, bucket by bucket, in the type that travels.

While bucket i is on its way, what stays on the rank is copied and bucket i + 1 is packed. Besides the tensors of both
sides there are two buckets of staging, which the exchange keeps from one swap to the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, Protocol

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
    _stage: str = field(default="", repr=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what runs inside for this stage."""
        begin, self._stage = perf_counter(), name
        yield
        self.seconds[name] += perf_counter() - begin

    def finish(self, done: Callable[[str], None], local: str) -> None:
        """Tell a side that a tensor is through; the stage in which that falls is not charged with it."""
        begin = perf_counter()
        done(local)
        seconds = perf_counter() - begin
        self.seconds["finish"] += seconds
        self.seconds[self._stage] -= seconds


@torch.no_grad()
def transfer(plan: RankPlan, source: Source, target: Target, exchange: Exchange) -> TransferReport:
    """Fill `target` from the `source` of all ranks; collective.

    A tensor of another float type than the plan's is rounded to that before it moves, or stays, so that all replicas of
    a target are equal. The first buckets' peers may still be at work with what was before: the exchange waits for them.

    Raises: TransferError when a peer does not come in time, or fails.
    """
    report = TransferReport()
    steps = [_Step(number, bucket, plan.dtypes, source, target, report) for number, bucket in enumerate(plan.buckets)]
    exchange.open([step.messages() for step in steps])
    report.staging_bytes = exchange.staging_bytes
    for step in steps[:1]:
        step.send(exchange)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        # Before the next bucket's packing, which may be the last to read what is copied here.
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
        self._sends, self._receives = _placed(bucket.sends, dtypes), _placed(bucket.receives, dtypes)
        reads = [copy.source for copy in bucket.copies] + _all(bucket.sends)
        writes = [copy.target for copy in bucket.copies] + _all(bucket.receives)
        self._sources = _Borrowed(source.read, source.finished, reads, bucket.finished_sources, report)
        self._targets = _Borrowed(target.write, target.complete, writes, bucket.complete_targets, report)

    def messages(self) -> Messages:
        """What goes to and comes from each peer."""
        sends, receives = (
            {peer: places[-1].end for peer, places in parts.items()} for parts in (self._sends, self._receives)
        )
        return Messages(sends, receives)

    def send(self, exchange: Exchange) -> None:
        """Pack and start the bucket."""
        with self._report.stage("wait"):
            memory = exchange.outgoing(self._number)
        with self._report.stage("pack"):
            for peer, places in self._sends.items():
                for place in places:
                    place.in_message(memory[peer]).copy_(self._sources.take(place.holding))
                    self._sources.used(place.holding)
                    self._report.sent_bytes += place.end - place.begin
            exchange.start(self._number)

    def copy(self) -> None:
        """Copy what stays on the rank."""
        with self._report.stage("copy"):
            for copy in self._bucket.copies:
                travels = self._dtypes[copy.source.tensor]
                elements = _fill(self._targets.take(copy.target), self._sources.take(copy.source), travels)
                self._report.copied_bytes += elements * travels.itemsize
                self._sources.used(copy.source)
                self._targets.used(copy.target)

    def receive(self, exchange: Exchange) -> None:
        """Wait for the bucket and unpack it."""
        with self._report.stage("wait"):
            memory = exchange.incoming(self._number)
        with self._report.stage("unpack"):
            for peer, places in self._receives.items():
                for place in places:
                    self._targets.take(place.holding).copy_(place.in_message(memory[peer]))
                    self._targets.used(place.holding)
                    self._report.received_bytes += place.end - place.begin
            exchange.release(self._number)

    def end(self) -> None:
        """Report the tensors that end with this bucket, although it does not touch them."""
        with self._report.stage("finish"):
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
        self._report.finish(self._done, local)


class _Place(NamedTuple):
    """Where a box lies in a message: its first byte, and the one behind its last."""

    holding: Holding
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def in_message(self, message: torch.Tensor) -> torch.Tensor:
        return message[self.begin : self.end].view(self.dtype).view(self.shape)


def _placed(parts: Mapping[int, tuple[Holding, ...]], dtypes: Mapping[str, torch.dtype]) -> dict[int, list[_Place]]:
    """The boxes of each peer's message; both sides reckon alike."""
    placed: dict[int, list[_Place]] = {}
    for peer, holdings in parts.items():
        end = 0
        for holding in holdings:
            dtype, shape = dtypes[holding.tensor], holding.box.shape
            # To be viewed as its type; where that is the same for all, messages have no gaps.
            begin = -(-end // dtype.itemsize) * dtype.itemsize
            end = begin + math.prod(shape) * dtype.itemsize
            placed.setdefault(peer, []).append(_Place(holding, begin, end, dtype, shape))
    return placed


def _fill(place: torch.Tensor, box: torch.Tensor, travels: torch.dtype) -> int:
    """Copy a box; returns its elements."""
    # A wider type would else get digits that no other rank's copy has.
    place.copy_(box if place.dtype == travels else box.to(travels))
    return place.numel()


def _all(parts: Mapping[int, tuple[Holding, ...]]) -> list[Holding]:
    return [holding for holdings in parts.values() for holding in holdings]
