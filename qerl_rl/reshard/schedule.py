"""Who sends each box of a plan, and in which bucket."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qerl_rl.layout.holdings import FullTensor
from qerl_rl.reshard.routes import Route

HALVINGS = 7
"""A bucket that has less left than itself halved HALVINGS - 1 times counts as full."""


@dataclass(frozen=True)
class Moves:
    """Arrays [boxes] int64 that are copied (sender and receiver are one) or sent."""

    tensor: np.ndarray
    box: np.ndarray
    sender: np.ndarray
    receiver: np.ndarray
    nbytes: np.ndarray
    bucket: np.ndarray


def choose_senders(tensors: Sequence[FullTensor], routes: Sequence[Route], world_size: int) -> Moves:
    """All boxes with who sends them, in the order of their tensors' progress (see `_progress`); bucket: not yet."""
    load = [0] * world_size
    columns: tuple[list[int], ...] = ([], [], [], [], [])
    tensor_of, box_of, sender_of, receiver_of, bytes_of = columns
    for index, (tensor, found) in enumerate(zip(tensors, routes, strict=True)):
        for demand in found.demands:
            nbytes, count = found.elements[demand.box] * tensor.dtype.itemsize, len(demand.ranks)
            if demand.senders:
                # A sender and its load as one number, which a heap compares fastest.
                heap = [load[sender] * world_size + sender for sender in demand.senders]
                heapq.heapify(heap)
                for _ in demand.ranks:
                    least = heap[0]
                    sender_of.append(least % world_size)
                    heapq.heapreplace(heap, least + nbytes * world_size)
                for loaded in heap:
                    load[loaded % world_size] = loaded // world_size
            else:
                sender_of.extend(demand.ranks)
            receiver_of.extend(demand.ranks)
            tensor_of.extend([index] * count)
            box_of.extend([demand.box] * count)
            bytes_of.extend([nbytes] * count)
    arrays = [np.array(column, dtype=np.int64) for column in columns]
    order = np.argsort(_progress(tensors, routes, arrays[0], arrays[4]), kind="stable")
    return Moves(*[array[order] for array in (*arrays, np.zeros_like(arrays[0]))])


def _progress(
    tensors: Sequence[FullTensor], routes: Sequence[Route], tensor_of: np.ndarray, nbytes: np.ndarray
) -> np.ndarray:
    """How far each box is, from 0 to 1, among those that the same ranks hold and the same ranks need.

    In this order all pipeline stages send at once, and a rank's own layers leave at the pace at which others arrive.
    """
    stages: dict[tuple, int] = {}
    of_layer: dict[int, list[Route]] = {}
    for tensor, found in zip(tensors, routes, strict=True):
        of_layer.setdefault(tensor.layer, []).append(found)
    stage_of_layer = {
        layer: stages.setdefault(
            tuple(frozenset().union(*(getattr(found, side) for found in all_of_it)) for side in ("holders", "needers")),
            len(stages),
        )
        for layer, all_of_it in of_layer.items()
    }
    stage = np.array([stage_of_layer[tensor.layer] for tensor in tensors], dtype=np.int64)[tensor_of]
    progress = np.zeros(len(tensor_of))
    for number in range(len(stages)):
        of_stage = np.flatnonzero(stage == number)
        done = np.cumsum(nbytes[of_stage])
        if len(done):
            progress[of_stage] = (done - nbytes[of_stage]) / done[-1]
    return progress


class _Rooms:
    """What is left of each rank's part of each bucket, of as many buckets as are asked for.

    For each size (a bucket halved again and again) and rank, a number has bit b set where bucket b has that much left.
    """

    def __init__(self, world_size: int, bucket_bytes: int) -> None:
        self._sizes = [bucket_bytes >> halvings for halvings in range(1, HALVINGS)]
        self._free = [[-1] * world_size for _ in self._sizes]
        self._left: list[dict[int, int]] = [{} for _ in range(world_size)]
        self._bucket_bytes = bucket_bytes

    def first(self, ranks: tuple[int, int], nbytes: int) -> int:
        """The first bucket that has room at both ranks; nbytes: at most half a bucket."""
        size = min((self._bucket_bytes // nbytes).bit_length() - 2, len(self._sizes) - 1)
        free = self._free[size][ranks[0]] & self._free[size][ranks[1]]
        return (free & -free).bit_length() - 1

    def take(self, rank: int, bucket: int, nbytes: int) -> None:
        """Use some of a bucket."""
        of_rank = self._left[rank]
        left = of_rank[bucket] = of_rank.get(bucket, self._bucket_bytes) - nbytes
        for size, free in zip(self._sizes, self._free, strict=True):
            if size <= left:
                break
            free[rank] &= ~(1 << bucket)


def scheduled(moves: Moves, world_size: int, bucket_bytes: int) -> Moves:
    """The boxes with their buckets: each comes into the first that has room at both ends.

    Copies have a room of their own of bucket_bytes, so that tensors of both layouts come and go together.
    """
    rooms, buckets = _Rooms(world_size, bucket_bytes), []
    reached, copying, copied = [0] * world_size, [0] * world_size, [0] * world_size
    for sender, receiver, nbytes in zip(
        moves.sender.tolist(), moves.receiver.tolist(), moves.nbytes.tolist(), strict=True
    ):
        if sender != receiver:
            bucket = rooms.first((sender, receiver), nbytes)
            rooms.take(sender, bucket, nbytes)
            rooms.take(receiver, bucket, nbytes)
            for rank in (sender, receiver):
                reached[rank] = max(reached[rank], bucket)
        else:
            # Not into an earlier one that has some room left: a copy of a later layer would take memory too soon.
            bucket = max(copying[sender], reached[sender])
            if bucket == copying[sender] and copied[sender] and copied[sender] + nbytes > bucket_bytes:
                bucket += 1
            if bucket > copying[sender]:
                copying[sender], copied[sender] = bucket, 0
            copied[sender] += nbytes
        buckets.append(bucket)
    found = np.array(buckets, dtype=np.int64)
    order = np.argsort(found, kind="stable")
    arrays = (moves.tensor, moves.box, moves.sender, moves.receiver, moves.nbytes, found)
    return Moves(*[array[order] for array in arrays])
