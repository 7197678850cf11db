"""The state of adapters and their optimizer, from the shards of one training layout into those of another.

A rank's file holds, of each adapter, one run of elements of this rank's part: the run its share of the distributed
optimizer owns. Parts and runs of all ranks together make the full tensors; any layout can be cut from those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.layout.slots import Slot

MOMENTS = ("exp_avg", "exp_avg_sq")

FullState = list[dict[str, torch.Tensor]]
"""By slot: master, exp_avg, exp_avg_sq as flat float32 tensors of the slot's block, and step, a number of updates.

Before the first update there is a master only.
"""


def full_state(
    slots: Sequence[Slot],
    shards: Iterable[tuple[Coordinates, Mapping[str, torch.Tensor]]],
    *,
    layers: int,
    sizes: ParallelSizes,
) -> FullState:
    """Put the shards of all ranks together.

    Args: slots: adapters of the whole model. shards: each rank's place in the layout `sizes`, and its file's tensors.
    Raises: ConfigError when they leave a gap.
    """
    full: FullState = [{} for _ in slots]
    for at, tensors in shards:
        for slot, found in zip(slots, full, strict=True):
            prefix = f"optimizer/{slot.module_path(layers, sizes)}/"
            if slot.stage(layers, sizes) != at.pipeline or f"{prefix}master" not in tensors:
                continue
            begin, count = int(tensors[f"{prefix}offset"]), tensors[f"{prefix}master"].numel()
            places = torch.arange(math.prod(slot.block.shape)).view(slot.block.shape)
            run = places[slot.block.part(sizes, at)].reshape(-1)[begin : begin + count]
            for kind in ("master", *MOMENTS):
                if prefix + kind in tensors:
                    target = found.setdefault(kind, torch.full((places.numel(),), torch.nan))
                    target[run] = tensors[prefix + kind].reshape(-1).float()
            if f"{prefix}step" in tensors:
                found["step"] = tensors[f"{prefix}step"]
    for slot, found in zip(slots, full, strict=True):
        if "master" not in found or any(tensor.isnan().any() for tensor in found.values()):
            raise ConfigError(
                f"the ranks' files hold no complete {slot.pieces[0].name.partition(':')[0]}.",
                fix="remove that checkpoint folder to resume from the one before",
            )
    return full


def local_state(
    slots: Sequence[Slot],
    full: FullState,
    *,
    layers: int,
    sizes: ParallelSizes,
    here: Coordinates,
    shapes: Mapping[str, torch.Size],
    runs: Mapping[str, slice],
) -> dict[str, torch.Tensor]:
    """What the rank at `here` of the layout `sizes` holds, under the names of `snapshot` (without random states).

    Args: shapes: of this rank's parameters by name. runs: the elements of each that its optimizer owns; a parameter
    that others own entirely is missing.
    """
    tensors = {}
    for slot, found in zip(slots, full, strict=True):
        if slot.stage(layers, sizes) != here.pipeline:
            continue
        name = slot.module_path(layers, sizes)
        parts = {kind: slot.block.take(found[kind], sizes, here).reshape(-1) for kind in found if kind != "step"}
        tensors[f"parameter/{name}"] = parts["master"].view(shapes[name])
        if name in runs:
            for kind, part in parts.items():
                tensors[f"optimizer/{name}/{kind}"] = part[runs[name]].clone()
            if "step" in found:
                tensors[f"optimizer/{name}/step"] = found["step"]
    return tensors
