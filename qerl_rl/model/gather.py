"""Full tensors out of the shards that the ranks hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed

from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.layout.slots import Slot


def gather_slots(
    slots: list[Slot],
    local: Callable[[Slot], torch.Tensor],
    *,
    layers: int,
    sizes: ParallelSizes,
    ranks: list[Coordinates],
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """The full blocks of the slots in their order, on every rank, in host memory.

    Collective over the world: one broadcast from each rank that holds parts.

    Args: local: this rank's tensor of a slot, called only for slots of its pipeline stage; layers: of the whole model;
    ranks: `all_coordinates()`; device: where the process group communicates.
    """
    full = [torch.empty(slot.block.shape, dtype=dtype) for slot in slots]
    here = torch.distributed.get_rank()
    for source in ranks:
        held = [number for number, slot in enumerate(slots) if _is_source(slot, source, layers, sizes)]
        if not held:
            continue
        shapes = [slots[number].block.part_shape(sizes, source) for number in held]
        counts = [math.prod(shape) for shape in shapes]
        flat = torch.empty(sum(counts), dtype=dtype, device=device)
        if source.rank == here:
            torch.cat([local(slots[number]).detach().to(device, dtype).reshape(-1) for number in held], out=flat)
        torch.distributed.broadcast(flat, src=source.rank)
        for number, shape, part in zip(held, shapes, flat.split(counts), strict=True):
            full[number][slots[number].block.part(sizes, source)] = part.view(shape)
    return full


def _is_source(slot: Slot, source: Coordinates, layers: int, sizes: ParallelSizes) -> bool:
    return slot.stage(layers, sizes) == source.pipeline and not slot.block.is_replica(source)
