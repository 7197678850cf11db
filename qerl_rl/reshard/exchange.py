"""Moves the bytes of one bucket after the other between ranks, through a process group or a machine's shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from time import perf_counter
from typing import Protocol

import torch
import torch.distributed as dist

from qerl_rl.platform.device import Device

SLOTS = 2
"""Buckets in memory at a time: one is packed while the one before it travels."""
ALIGNMENT = 64
"""Bytes: messages begin at multiples of it, so that what is in them can be viewed as any type."""


class TransferError(Exception):
    """A bucket did not get through; the message says which, between which ranks, and how long was waited."""


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank sends and receives in one bucket, by peer."""

    sends: Mapping[int, int]
    receives: Mapping[int, int]


class Exchange(Protocol):
    """Carries buckets; every rank calls the methods in the same order: open, then (see `transfer`) outgoing and start
    of bucket i + 1 before incoming and release of bucket i, and close.
    """

    @property
    def staging_bytes(self) -> int:
        """Memory that it holds, from the first `open` on."""

    def open(self, buckets: Sequence[Messages]) -> None:
        """Begin to carry these; memory of an earlier time is used again."""

    def outgoing(self, bucket: int) -> dict[int, torch.Tensor]:
        """Memory ([bytes] uint8, by peer) to pack the sends of a bucket into; what was in it has arrived."""

    def start(self, bucket: int) -> None:
        """Send what was packed. Does not wait."""

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        """What the peers sent ([bytes] uint8, by peer).

        Raises: TransferError when one does not come in time.
        """

    def release(self, bucket: int) -> None:
        """What `incoming` gave has been read."""

    def close(self) -> None:
        """Wait until the peers have all of it."""


class ProcessGroupExchange:
    """Through torch.distributed: one batch of sends and receives a bucket (grouped into one call by NCCL and HCCL).

    Only ranks that have something for each other meet, unlike in an all-to-all. Both slots lie on the device.
    """

    def __init__(self, device: Device, timeout_s: float, group: dist.ProcessGroup | None = None) -> None:
        self._device, self._timeout_s, self._group = device, timeout_s, group
        self._memory: list[torch.Tensor] = []
        self._buckets: Sequence[Messages] = ()
        self._works: dict[int, list[tuple[str, dist.Work]]] = {}

    @property
    def staging_bytes(self) -> int:
        return sum(memory.numel() for memory in self._memory)

    def open(self, buckets: Sequence[Messages]) -> None:
        self._buckets, self._works = buckets, {}
        most = max((sum(map(aligned, (*b.sends.values(), *b.receives.values()))) for b in buckets), default=0)
        if not self._memory or self._memory[0].numel() < most:
            self._memory = []
            self._memory = [torch.empty(most, dtype=torch.uint8, device=self._device.current()) for _ in range(SLOTS)]

    def outgoing(self, bucket: int) -> dict[int, torch.Tensor]:
        return cut(self._memory[bucket % SLOTS], self._buckets[bucket].sends)

    def start(self, bucket: int) -> None:
        sends, receives = self.outgoing(bucket), self._incoming(bucket)
        # gloo reads from a peer only once somebody wants it.
        batch = [(f"bytes from rank {peer}", dist.irecv, data, peer) for peer, data in receives.items()]
        batch += [(f"rank {peer} to take bytes", dist.isend, data, peer) for peer, data in sends.items()]
        if not batch:
            return
        with failing(bucket, len(self._buckets), "the batch to start"):
            operations = [dist.P2POp(op, data, group=self._group, group_peer=peer) for _, op, data, peer in batch]
            works = dist.batch_isend_irecv(operations)
        titles = [title for title, *_ in batch]
        # A backend that groups them gives one work for all.
        titles = titles if len(works) == len(titles) else [" and ".join(titles)] * len(works)
        self._works[bucket] = list(zip(titles, works, strict=True))

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        for title, work in self._works.pop(bucket, []):
            with failing(bucket, len(self._buckets), title):
                self._device.wait(work, self._timeout_s)
        return self._incoming(bucket)

    def release(self, bucket: int) -> None:
        pass

    def close(self) -> None:
        pass

    def _incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        messages = self._buckets[bucket]
        sent = sum(map(aligned, messages.sends.values()))
        return cut(self._memory[bucket % SLOTS][sent:], messages.receives)


class MixedExchange:
    """Some peers by one exchange, the others by another."""

    def __init__(self, near: Exchange, far: Exchange, near_peers: frozenset[int]) -> None:
        self._near, self._far, self._near_peers = near, far, near_peers

    @property
    def staging_bytes(self) -> int:
        return self._near.staging_bytes + self._far.staging_bytes

    def open(self, buckets: Sequence[Messages]) -> None:
        self._near.open([self._part(bucket, True) for bucket in buckets])
        self._far.open([self._part(bucket, False) for bucket in buckets])

    def outgoing(self, bucket: int) -> dict[int, torch.Tensor]:
        return self._near.outgoing(bucket) | self._far.outgoing(bucket)

    def start(self, bucket: int) -> None:
        self._far.start(bucket)
        self._near.start(bucket)

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        return self._near.incoming(bucket) | self._far.incoming(bucket)

    def release(self, bucket: int) -> None:
        self._near.release(bucket)
        self._far.release(bucket)

    def close(self) -> None:
        self._near.close()
        self._far.close()

    def _part(self, bucket: Messages, near: bool) -> Messages:
        def those(sizes: Mapping[int, int]) -> dict[int, int]:
            return {peer: size for peer, size in sizes.items() if (peer in self._near_peers) is near}

        return Messages(those(bucket.sends), those(bucket.receives))


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def cut(memory: torch.Tensor, sizes: Mapping[int, int]) -> dict[int, torch.Tensor]:
    """Memory for a message a peer, from the beginning on."""
    begins = accumulate(map(aligned, sizes.values()), initial=0)
    return {peer: memory[begin : begin + size] for begin, (peer, size) in zip(begins, sizes.items(), strict=False)}


@contextmanager
def failing(bucket: int, buckets: int, title: str) -> Iterator[None]:
    """Name the bucket, and what was waited for how long, when a process group fails."""
    begin = perf_counter()
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        waited = perf_counter() - begin
        raise TransferError(
            f"resharding, bucket {bucket + 1} of {buckets}: waited {waited:.1f} s for {title}: {error}. "
            "Look into that rank's log for why it ended or hangs; if it is only slow, raise fault.train_timeout_s"
        ) from error
