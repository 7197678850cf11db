"""The trainer reads the frozen experts out of the rollout engine's memory, where that holds the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import weight_slots
from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.model.adapted import AdaptedModule
from qerl_rl.model.base_weight import Base
from qerl_rl.model.parallel import current_coordinates, current_sizes


@dataclass
class Adoption:
    """What became of the weights that were offered to one model.

    bytes: of the model's own tensors that were given up, by the weight's name. different: names of weights that fit but
    hold other numbers.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)


@torch.no_grad()
def adopt_experts(
    model: torch.nn.Module,
    architecture: MoeArchitecture,
    offered: Iterable[StoredExperts],
    give_up: Callable[[list[torch.Tensor]], None],
) -> Adoption:
    """Let this rank's expert layers read what of `offered` holds all their experts, bit for bit; all are compared.

    A weight of another layout (experts that the engine's rank lacks, other parts of each) or another format keeps its
    tensors. give_up: gets those that no layer needs any more, layer by layer.
    """
    sizes, here = current_sizes(), current_coordinates()
    by_name = {stored.name: stored for stored in offered}
    adoption = Adoption()
    for slot in weight_slots(architecture, sizes, model.head):
        stored = by_name.get(f"model.layers.{slot.layer}.{slot.name}")
        if stored is None or slot.stage(architecture.layers, sizes) != here.pipeline:
            continue
        path, _, name = slot.module_path(architecture.layers, sizes).rpartition(".")
        module = model.get_submodule(path)
        assert isinstance(module, AdaptedModule)
        own = module.base(name)
        offer = _offer(stored, slot.block.part(sizes, here)[0], (here.expert_tensor, sizes.expert_tensor))
        if offer is None or not _alike(own, offer):
            continue
        if not _equal(own, offer):
            adoption.different.append(stored.name)
            continue
        module.adopt(name, offer)
        adoption.bytes[stored.name] = sum(tensor.nbytes for tensor in own.tensors)
        give_up(list(own.tensors))
    return adoption


def _offer(stored: StoredExperts, experts: slice, share: tuple[int, int]) -> Base | None:
    """What is stored of these experts; None where some of them, or this share of each, is not."""
    if stored.share != share or not {experts.start, experts.stop - 1} <= set(stored.experts):
        return None
    return Base(stored.some(experts.start, experts.stop - experts.start), stored.format)


def _alike(own: Base, offer: Base) -> bool:
    """Whether both are weights of one shape in one format on one device (an engine may run beside the card)."""
    if own.format is None or offer.format is None or len(own.tensors[0]) != len(offer.tensors[0]):
        return False
    if own.tensors[0].device != offer.tensors[0].device:
        return False
    formats = [(base.format.name, base.format.group_size, base.format.parts) for base in (own, offer) if base.format]
    return formats[0] == formats[1] and (own.outputs, own.inputs) == (offer.outputs, offer.inputs)


def _equal(own: Base, offer: Base) -> bool:
    """Whether all numbers of all parts are the same."""
    assert own.format is not None
    assert offer.format is not None
    for parts, offered in zip(own.parts(), offer.parts(), strict=True):
        others = offer.format.unpacked(offered)
        if not all(torch.equal(parts[part.suffix], others[part.suffix]) for part in own.format.parts):
            return False
    return True
