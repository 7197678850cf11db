"""LoRA adapters: first values, switching off, and the exchange with the rollout engine and checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import Slot, adapter_slots, find_tensor
from qerl_rl.model.adapted import AdaptedModule
from qerl_rl.model.gather import gather_slots
from qerl_rl.model.parallel import all_coordinates, current_coordinates, current_sizes


@torch.no_grad()
def initialize_adapters(model: torch.nn.Module, architecture: MoeArchitecture, seed: int) -> None:
    """A normal with standard deviation 1 / sqrt(inputs), B zero: the model starts as its base.

    The numbers depend on the seed, the tensor's name and the expert alone: every layout starts from the same adapter.
    """
    sizes, here = current_sizes(), current_coordinates()
    for slot in _slots(model, architecture):
        if slot.stage(architecture.layers, sizes) != here.pipeline:
            continue
        target = find_tensor(model, slot.module_path(architecture.layers, sizes))
        if slot.name.endswith("lora_B"):
            target.zero_()
            continue
        shape, name = slot.block.shape, slot.pieces[0].name
        if slot.block.is_expert:
            full = torch.stack([_normal(seed, f"{name}/{expert}", shape[1:]) for expert in range(shape[0])])
        else:
            full = _normal(seed, name, shape)
        target.copy_(slot.block.take(full, sizes, here).reshape(target.shape))


def _normal(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") % 2**63
    return torch.randn(shape, generator=torch.Generator().manual_seed(key)) * shape[-1] ** -0.5


def _slots(model: torch.nn.Module, architecture: MoeArchitecture) -> list[Slot]:
    """The adapters of the whole model (a pipeline stage has those of its layers)."""
    lora = model.lora
    return [] if lora is None else adapter_slots(architecture, lora)


@torch.no_grad()
def gather_adapters(model: torch.nn.Module, architecture: MoeArchitecture) -> dict[str, torch.Tensor]:
    """All adapters in the exchange format (full tensors, float32), on every rank. Collective over the world."""
    sizes, layers = current_sizes(), architecture.layers
    slots = _slots(model, architecture)
    full = gather_slots(
        slots,
        lambda slot: find_tensor(model, slot.module_path(layers, sizes)),
        layers=layers,
        sizes=sizes,
        ranks=all_coordinates(),
        dtype=torch.float32,
        device=next(model.parameters()).device,
    )
    parts: dict[str, list[torch.Tensor]] = {}
    for slot, tensor in zip(slots, full, strict=True):
        for piece in slot.pieces:
            parts.setdefault(piece.name.partition(":")[0], []).append(tensor[piece.index].reshape(piece.shape))
    return {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}


@torch.no_grad()
def load_adapters(model: torch.nn.Module, architecture: MoeArchitecture, tensors: dict[str, torch.Tensor]) -> None:
    """Set this rank's part of every adapter from the exchange format. Not collective.

    Raises: ValueError when a tensor is missing or superfluous, or has another shape than the model's adapter.
    """
    sizes, here = current_sizes(), current_coordinates()
    slots = _slots(model, architecture)
    expected = {piece.name.partition(":")[0] for slot in slots for piece in slot.pieces}
    if expected != tensors.keys():
        raise ValueError(f"adapters don't fit the model: {sorted(expected ^ tensors.keys())[:3]} on one side only")
    for slot in slots:
        if slot.stage(architecture.layers, sizes) != here.pipeline:
            continue
        name = slot.pieces[0].name.partition(":")[0]
        rows = [piece.shape[0] for piece in slot.pieces]
        if tensors[name].shape != (sum(rows), *slot.pieces[0].shape[1:]):
            raise ValueError(f"adapter {name} has shape {tuple(tensors[name].shape)}, which is not the model's")
        full = torch.empty(slot.block.shape)
        for piece, part in zip(slot.pieces, tensors[name].split(rows), strict=True):
            full[piece.index] = part.reshape(full[piece.index].shape).to(full)
        target = find_tensor(model, slot.module_path(architecture.layers, sizes))
        target.copy_(slot.block.take(full, sizes, here).reshape(target.shape))


@contextmanager
def adapters_disabled(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model computes exactly its base: the reference policy, without a second model."""
    adapted = [module for module in model.modules() if isinstance(module, AdaptedModule) and module.adapters_enabled]
    for module in adapted:
        module.adapters_enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.adapters_enabled = True
