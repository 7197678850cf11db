"""HF checkpoint to Megatron model and back, for any layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.distributed

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.model.adapted import AdaptedModule
from qerl_rl.model.architecture import MoeArchitecture
from qerl_rl.model.gather import gather_slots
from qerl_rl.model.parallel import all_coordinates, current_coordinates, current_sizes
from qerl_rl.model.slots import Piece, Slot, find_tensor, weight_slots
from qerl_rl.quant.checkpoint import CheckpointReader


@torch.no_grad()
def load_hf(model: torch.nn.Module, reader: CheckpointReader, architecture: MoeArchitecture) -> None:
    """Fill this rank's base weights from a HF checkpoint; tensors of other ranks' layers and experts are not read.

    Weights take the dtype of the model; int8 weights and their scales are kept as they are.
    Raises: ConfigError when a tensor is missing, has another shape, or is int8 where the model is not (or reverse).
    """
    sizes, here = current_sizes(), current_coordinates()
    for slot in weight_slots(architecture, sizes, model.head):
        if slot.stage(architecture.layers, sizes) != here.pipeline:
            continue
        if slot.optional and all(piece.name not in reader for piece in slot.pieces):
            continue
        target = find_tensor(model, slot.module_path(architecture.layers, sizes))
        _fill(target, slot, reader, sizes, here)
        if target.dtype == torch.int8:
            scales = slot.scales()
            _fill(find_tensor(model, scales.module_path(architecture.layers, sizes)), scales, reader, sizes, here)


def _fill(target: torch.Tensor, slot: Slot, reader: CheckpointReader, sizes: ParallelSizes, here: Coordinates) -> None:
    shape = slot.block.part_shape(sizes, here)
    if not slot.block.is_expert:
        full = torch.zeros(slot.block.shape, dtype=target.dtype)
        for piece in slot.pieces:
            _copy(full[piece.index], piece, reader)
        target.copy_(slot.block.take(full, sizes, here).reshape(target.shape))
        return
    experts, *inner = slot.block.part(sizes, here)
    view = target.view(shape)
    for piece in slot.pieces:
        expert, *row = piece.index
        if experts.start <= expert < experts.stop:
            # What is left of the part's index after the expert (and gate or up) has been chosen.
            local = torch.empty(piece.shape, dtype=target.dtype)
            _copy(local, piece, reader)
            view[(expert - experts.start, *row)] = local[tuple(inner[len(row) :])]


def _copy(target: torch.Tensor, piece: Piece, reader: CheckpointReader) -> None:
    """Copy a tensor of the checkpoint into `target`, which may be shaped otherwise and of another float type."""
    where = str(reader.path)
    if piece.name not in reader:
        raise ConfigError(
            f"the checkpoint has no {piece.name}.", fix="use a complete checkpoint of this model", where=where
        )
    found = reader.get(piece.name)
    if found.shape != piece.shape:
        raise ConfigError(
            f"{piece.name} has shape {tuple(found.shape)}, but config.json means {piece.shape}.",
            fix="use config.json and weights of the same model",
            where=where,
        )
    if (found.dtype == torch.int8) != (target.dtype == torch.int8):
        expected = "w8a8" if found.dtype == torch.int8 else "none"
        raise ConfigError(
            f"{piece.name} is stored as {found.dtype}.",
            fix=f"set quant.format to {expected}, or use another checkpoint",
            where=where,
        )
    target.copy_(found.reshape(target.shape))


@torch.no_grad()
def export_hf(
    model: torch.nn.Module, architecture: MoeArchitecture, *, merge_adapters: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) of every weight, in the dtype of the model and the order of its layers.

    Collective: every rank must exhaust it; rank 0 gets the tensors, the others nothing. Memory holds one layer at a
    time. A quantized base comes dequantized. merge_adapters adds scaling * B A to the base, computed in float32.
    """
    sizes, ranks, layers = current_sizes(), all_coordinates(), architecture.layers

    def local(slot: Slot) -> torch.Tensor:
        return _float_weight(model, slot.module_path(layers, sizes), merge_adapters)

    dtype, device = model.config.params_dtype, next(model.parameters()).device
    slots = [slot for slot in weight_slots(architecture, sizes, model.head) if slot.exported]
    for _, group in groupby(slots, key=lambda slot: slot.layer):
        of_layer = list(group)
        full = gather_slots(of_layer, local, layers=layers, sizes=sizes, ranks=ranks, dtype=dtype, device=device)
        if torch.distributed.get_rank() == 0:
            for slot, tensor in zip(of_layer, full, strict=True):
                for piece in slot.pieces:
                    yield piece.name, tensor[piece.index].reshape(piece.shape)


def _float_weight(model: torch.nn.Module, path: str, merge_adapters: bool) -> torch.Tensor:
    """This rank's part of a base weight, dequantized and (if asked) with its adapter."""
    tensor = find_tensor(model, path)
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if not isinstance(module, AdaptedModule):
        return tensor
    scale = module.base(name).scale
    weight = tensor if scale is None else tensor.float() * scale
    if merge_adapters and hasattr(module, f"{name}_lora_A"):
        a, b = (getattr(module, f"{name}_lora_{matrix}").float() for matrix in "AB")
        weight = weight.float() + module.scaling * (b @ a)
    return weight
