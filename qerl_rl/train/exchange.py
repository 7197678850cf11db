"""Small numbers from all ranks: sums that come out equal everywhere, and maxima."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist


def sum_over_ranks(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The sum of each named number over all ranks of the world, added in rank order: the same bits everywhere.

    Ranks may name different numbers (only the last pipeline stage knows the metrics); a missing one counts as 0.
    """
    payload = torch.frombuffer(bytearray(json.dumps(dict(values)).encode()), dtype=torch.uint8).to(device)
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([payload.numel()], dtype=torch.int64, device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: payload.numel()] = payload
    received = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(received, padded)
    sums: dict[str, float] = {}
    for size, encoded in zip(sizes, received, strict=True):
        for name, value in json.loads(bytes(encoded[: int(size)].tolist())).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def largest_over(group: dist.ProcessGroup, value: int, device: torch.device) -> int:
    """The largest `value` of the ranks of `group`."""
    largest = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return int(largest)
