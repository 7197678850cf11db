"""Many ranks in one process: a thread a rank, and an exchange that hands bytes over in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from qerl_rl.reshard.exchange import SLOTS, Messages, TransferError


class SimulatedWorld:
    """What the ranks of one process share: messages on their way, by (channel, sender, receiver, bucket)."""

    def __init__(self, ranks: int, timeout_s: float = 20.0) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self.post: dict[tuple[str, int, int, int], torch.Tensor] = {}
        self.changed = threading.Condition()
        self.broken = False

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """`function(rank)` on every rank at once; the error of a rank is raised, at once."""

        def guarded(rank: int) -> Any:
            try:
                return function(rank)
            except BaseException:
                with self.changed:
                    self.broken = True
                    self.changed.notify_all()
                raise

        with ThreadPoolExecutor(self.ranks) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.ranks)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        # What the others say for want of a peer comes behind.
        for error in sorted(errors, key=lambda error: isinstance(error, TransferError)):
            raise error
        return [future.result() for future in futures]


class SimulatedExchange:
    """An Exchange with two buffers, which turn to garbage before they are packed anew."""

    def __init__(self, world: SimulatedWorld, rank: int, channel: str = "") -> None:
        self._world, self._rank, self._channel = world, rank, channel
        self._buckets: Sequence[Messages] = ()
        self._memory: list[torch.Tensor] = []
        self._used: set[int] = set()

    @property
    def staging_bytes(self) -> int:
        return sum(memory.numel() for memory in self._memory)

    def open(self, buckets: Sequence[Messages]) -> None:
        self._buckets = buckets
        most = max((sum((*b.sends.values(), *b.receives.values())) for b in buckets), default=0)
        # Messages begin at multiples of 8 here: the widest type there is.
        most += 8 * 2 * self._world.ranks
        if not self._memory or self._memory[0].numel() < most:
            self._memory = [torch.empty(most, dtype=torch.uint8) for _ in range(SLOTS)]

    def _cut(self, bucket: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        end, cuts = 0, []
        for sizes in (self._buckets[bucket].sends, self._buckets[bucket].receives):
            cuts.append({})
            for peer, size in sizes.items():
                cuts[-1][peer] = self._memory[bucket % SLOTS][end : end + size]
                end += -(-size // 8) * 8
        return cuts[0], cuts[1]

    def outgoing(self, bucket: int) -> dict[int, torch.Tensor]:
        mine = (self._channel, self._rank)
        self._wait(lambda: not any(key[:2] == mine and key[3] == bucket - SLOTS for key in self._world.post))
        assert bucket % SLOTS not in self._used, "a buffer is packed while the bucket in it is still read"
        self._used.add(bucket % SLOTS)
        self._memory[bucket % SLOTS].fill_(0xA5)
        return self._cut(bucket)[0]

    def start(self, bucket: int) -> None:
        with self._world.changed:
            for peer, message in self._cut(bucket)[0].items():
                self._world.post[self._channel, self._rank, peer, bucket] = message
            self._world.changed.notify_all()

    def incoming(self, bucket: int) -> dict[int, torch.Tensor]:
        messages = self._cut(bucket)[1]
        for peer, message in messages.items():
            key = (self._channel, peer, self._rank, bucket)
            self._wait(lambda key=key: key in self._world.post)
            with self._world.changed:
                message.copy_(self._world.post.pop(key))
                self._world.changed.notify_all()
        return messages

    def release(self, bucket: int) -> None:
        self._used.remove(bucket % SLOTS)

    def close(self) -> None:
        self._wait(lambda: not any(key[:2] == (self._channel, self._rank) for key in self._world.post))

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._world.changed:
            self._world.changed.wait_for(lambda: condition() or self._world.broken, self._world.timeout_s)
            if not condition():
                raise TransferError(f"rank {self._rank}: a peer failed, or took {self._world.timeout_s} s")
