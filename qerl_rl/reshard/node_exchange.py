"""Ranks of one machine exchange buckets through memory that they share; the process group carries only a word each."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from qerl_rl.platform.device import Device
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
"""Tags of the words: bytes lie ready in the sender's memory; their receiver has read them."""


class NodeExchange:
    """Each rank packs into a block of its own, which its peers map and unpack from: two copies, no socket.

    A word from the sender says that a message is there and where; one from the receiver that its memory is free again.
    The words go through the process group, whose system calls also order what the processors see.
    """

    def __init__(
        self, block: SharedBlock, peers: dict[int, SharedBlock], timeout_s: float, group: dist.ProcessGroup | None
    ) -> None:
        self._block, self._peers, self._timeout_s, self._group = block, peers, timeout_s, group
        self._buckets: Sequence[Messages] = ()
        self._slot_bytes = 0
        self._awaited: dict[tuple[int, int, int], tuple[dist.Work, torch.Tensor]] = {}
        self._said: list[tuple[dist.Work, torch.Tensor]] = []

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
            self._listen(_READ, peer, bucket)
            offset += aligned(size)
        for peer in messages.receives:
            self._listen(_PACKED, peer, bucket)

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for peer, size in self._buckets[bucket].receives.items():
            number, offset, sent = self._hear(_PACKED, peer, bucket, f"bytes from rank {peer}")
            if (number, sent) != (bucket, size):
                raise TransferError(
                    f"resharding: rank {peer} sent {sent} bytes of bucket {number + 1} where {size} of bucket "
                    f"{bucket + 1} were due: the two ranks' plans differ"
                )
            found[peer] = self._peers[peer].view(offset, size)
        return found

    def release(self, bucket: int) -> None:
        for peer in self._buckets[bucket].receives:
            self._say(_READ, peer, bucket, 0, 0)

    def close(self) -> None:
        for bucket in range(max(0, len(self._buckets) - SLOTS), len(self._buckets)):
            self._wait_until_read(bucket)
        with failing(len(self._buckets) - 1, len(self._buckets), "the last words to be taken"):
            for work, _ in self._said:
                work.wait(timedelta(seconds=self._timeout_s))
        self._said.clear()

    def _wait_until_read(self, bucket: int) -> None:
        for peer in self._buckets[bucket].sends:
            self._hear(_READ, peer, bucket, f"rank {peer} to read its bytes")

    def _say(self, tag: int, peer: int, *words: int) -> None:
        said = torch.tensor(words)
        with failing(words[0], len(self._buckets), f"a word to rank {peer}"):
            work = dist.isend(said, group=self._group, group_dst=peer, tag=tag)
        assert work is not None
        self._said.append((work, said))

    def _listen(self, tag: int, peer: int, bucket: int) -> None:
        heard = torch.zeros(3, dtype=torch.int64)
        with failing(bucket, len(self._buckets), f"a word from rank {peer}"):
            work = dist.irecv(heard, group=self._group, group_src=peer, tag=tag)
        assert work is not None
        self._awaited[tag, peer, bucket] = work, heard

    def _hear(self, tag: int, peer: int, bucket: int, title: str) -> list[int]:
        work, heard = self._awaited.pop((tag, peer, bucket))
        with failing(bucket, len(self._buckets), title):
            work.wait(timedelta(seconds=self._timeout_s))
        return heard.tolist()


def make_exchange(device: Device, timeout_s: float, group: dist.ProcessGroup | None = None) -> Exchange:
    """The fastest exchange between the ranks of `group` (plans count ranks as it does); collective.

    timeout_s: what one bucket waits for a peer at most.
    """
    far = ProcessGroupExchange(device, timeout_s, group)
    if not device.shares_host_memory:
        return far
    block, peers = _share(group)
    if block is None or not peers:
        return far
    near = NodeExchange(block, peers, timeout_s, group)
    return near if len(peers) == dist.get_world_size(group) - 1 else MixedExchange(near, far, frozenset(peers))


def _share(group: dist.ProcessGroup | None) -> tuple[SharedBlock | None, dict[int, SharedBlock]]:
    """This rank's block, and those of the peers that it can map and that can map this one."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    try:
        block = SharedBlock.create()
    except OSError:
        block = None
    addresses: list[Address | None] = [None] * ranks
    dist.all_gather_object(addresses, block and block.address, group=group)
    peers: dict[int, SharedBlock] = {}
    for peer, address in enumerate(addresses):
        if peer != rank and address is not None:
            try:
                peers[peer] = SharedBlock.open(Address(*address))
            except OSError:
                continue
    mapped: list[set[int]] = [set()] * ranks
    dist.all_gather_object(mapped, set(peers), group=group)
    return block, {peer: peers[peer] for peer in peers if rank in mapped[peer]}
