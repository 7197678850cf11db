"""Ranks of one machine exchange buckets through memory that they share; pipes carry a word about each message."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist

from qerl_rl.platform.device import Device
from qerl_rl.platform.mailbox import MailAddress, Mailbox, Outbox
from qerl_rl.platform.shared_memory import Address, SharedBlock
from qerl_rl.reshard.exchange import (
    SLOTS,
    Exchange,
    Messages,
    MixedExchange,
    ProcessGroupExchange,
    TransferError,
    aligned,
    cut,
    failing,
)

_PACKED, _READ = 1, 2
"""Kinds of words: bytes lie ready in the sender's memory; their receiver has read them."""


@dataclass(frozen=True)
class Neighbour:
    """Another rank of this machine: the memory that it packs into, and its mailbox."""

    block: SharedBlock
    mail: Outbox


class NodeExchange:
    """Each rank packs into a block of its own, which its peers map and unpack from: two copies, no socket.

    A word from the sender says that a message is there and where; one from the receiver that its memory is free again.
    Words are written and read by system calls, which also order what the processors see.
    """

    def __init__(
        self, rank: int, block: SharedBlock, mail: Mailbox, peers: Mapping[int, Neighbour], timeout_s: float
    ) -> None:
        self._rank, self._block, self._mail, self._peers, self._timeout_s = rank, block, mail, peers, timeout_s
        self._buckets: Sequence[Messages] = ()
        self._slot_bytes = 0
        self._heard: defaultdict[tuple[int, int], deque[list[int]]] = defaultdict(deque)

    @property
    def staging_bytes(self) -> int:
        """Of this rank's own block: what it reads from is its peers'."""
        return SLOTS * self._slot_bytes

    def open(self, buckets: Sequence[Messages]) -> None:
        self._buckets = buckets
        most = max((sum(map(aligned, bucket.sends.values())) for bucket in buckets), default=0)
        self._slot_bytes = max(self._slot_bytes, most)
        self._block.grow(SLOTS * self._slot_bytes)

    def outgoing(self, bucket: int) -> dict[int, torch.Tensor]:
        if bucket >= SLOTS:
            self._wait_until_read(bucket - SLOTS)
        memory = self._block.view(bucket % SLOTS * self._slot_bytes, self._slot_bytes)
        return cut(memory, self._buckets[bucket].sends)

    def start(self, bucket: int) -> None:
        messages = self._buckets[bucket]
        offset = bucket % SLOTS * self._slot_bytes
        for peer, size in messages.sends.items():
            self._say(_PACKED, peer, bucket, offset, size)
            offset += aligned(size)

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for peer, size in self._buckets[bucket].receives.items():
            number, offset, sent = self._hear(_PACKED, peer, bucket, f"bytes from rank {peer}")
            if (number, sent) != (bucket, size):
                raise TransferError(
                    f"resharding: rank {peer} sent {sent} bytes of bucket {number + 1} where {size} of bucket "
                    f"{bucket + 1} were due: the two ranks' plans differ"
                )
            found[peer] = self._peers[peer].block.view(offset, size)
        return found

    def release(self, bucket: int) -> None:
        for peer in self._buckets[bucket].receives:
            self._say(_READ, peer, bucket, 0, 0)

    def close(self) -> None:
        for bucket in range(max(0, len(self._buckets) - SLOTS), len(self._buckets)):
            self._wait_until_read(bucket)

    def _wait_until_read(self, bucket: int) -> None:
        for peer in self._buckets[bucket].sends:
            self._hear(_READ, peer, bucket, f"rank {peer} to read its bytes")

    def _say(self, kind: int, peer: int, bucket: int, offset: int, size: int) -> None:
        with failing(bucket, len(self._buckets), f"rank {peer} to take a word"):
            self._peers[peer].mail.put(kind, self._rank, bucket, offset, size)

    def _hear(self, kind: int, peer: int, bucket: int, title: str) -> list[int]:
        """The next word of this kind of a peer; others that come meanwhile are kept."""
        words, deadline = self._heard[kind, peer], perf_counter() + self._timeout_s
        with failing(bucket, len(self._buckets), title):
            while not words:
                found, sender, *word = self._mail.take(deadline - perf_counter(), self._peers[peer].mail.process)
                self._heard[found, sender].append(word)
        return words.popleft()


def make_exchange(device: Device, timeout_s: float, group: dist.ProcessGroup | None = None) -> Exchange:
    """The fastest exchange between the ranks of `group` (plans count ranks as it does); collective.

    timeout_s: what one bucket waits for a peer at most.
    """
    far = ProcessGroupExchange(device, timeout_s, group)
    if not device.shares_host_memory:
        return far
    block, mail, peers = _share(group)
    if block is None or mail is None or not peers:
        return far
    near = NodeExchange(dist.get_rank(group), block, mail, peers, timeout_s)
    return near if len(peers) == dist.get_world_size(group) - 1 else MixedExchange(near, far, frozenset(peers))


def _share(group: dist.ProcessGroup | None) -> tuple[SharedBlock | None, Mailbox | None, dict[int, Neighbour]]:
    """This rank's block and mailbox, and the peers that reach these and that it reaches."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    block: SharedBlock | None = None
    mail: Mailbox | None = None
    # Where the system has neither, this rank takes part by the process group.
    with suppress(OSError):
        block, mail = SharedBlock.create(), Mailbox()
    addresses: list[tuple[Address, MailAddress] | None] = [None] * ranks
    dist.all_gather_object(addresses, (block.address, mail.address) if block and mail else None, group=group)
    peers: dict[int, Neighbour] = {}
    for peer, address in enumerate(addresses):
        if peer != rank and address is not None:
            try:
                peers[peer] = Neighbour(SharedBlock.open(Address(*address[0])), Outbox(MailAddress(*address[1])))
            except OSError:
                continue
    reached: list[set[int]] = [set()] * ranks
    dist.all_gather_object(reached, set(peers), group=group)
    return block, mail, {peer: peers[peer] for peer in peers if rank in reached[peer]}
