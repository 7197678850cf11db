"""HF checkpoint to Megatron model and back, for any layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.distributed

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.layout.slots import Piece, Slot, find_tensor, weight_slots
from qerl_rl.model.adapted import AdaptedModule
from qerl_rl.model.formats import described, same_format
from qerl_rl.model.gather import gather_slots
from qerl_rl.model.parallel import all_coordinates, current_coordinates, current_sizes
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import Format, Part


@torch.no_grad()
def load_hf(model: torch.nn.Module, reader: CheckpointReader, architecture: MoeArchitecture) -> None:
    """Fill this rank's base weights from a HF checkpoint, reading the rows and columns of this rank only.

    Float weights take the dtype of the model; the parts of quantized ones are kept as they are.
    Raises: ConfigError when a tensor is missing, has another shape, or another format than the model was built for.
    """
    sizes, here = current_sizes(), current_coordinates()
    for slot in weight_slots(architecture, sizes, model.head):
        if slot.stage(architecture.layers, sizes) != here.pipeline:
            continue
        if slot.optional and all(piece.name not in reader for piece in slot.pieces):
            continue
        path = slot.module_path(architecture.layers, sizes)
        format = _model_format(model, path)
        if slot.quantizable:
            _check_format(slot, format, reader, sizes, here)
        for part in format.parts if format else (None,):
            target = find_tensor(model, path + (part.suffix if part else ""))
            _fill(target, slot.part(part) if part else slot, part, reader, sizes, here)


def _model_format(model: torch.nn.Module, path: str) -> Format | None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    return module.formats.get(name) if isinstance(module, AdaptedModule) else None


def _local_pieces(slot: Slot, sizes: ParallelSizes, here: Coordinates) -> list[Piece]:
    if not slot.block.is_expert:
        return list(slot.pieces)
    experts = slot.block.part(sizes, here)[0]
    return [piece for piece in slot.pieces if experts.start <= piece.index[0] < experts.stop]


def _check_format(
    slot: Slot, format: Format | None, reader: CheckpointReader, sizes: ParallelSizes, here: Coordinates
) -> None:
    for piece in _local_pieces(slot, sizes, here):
        stored = reader.format_of(piece.name)
        if not same_format(stored, format) and (stored or piece.name in reader):
            raise ConfigError(
                f"{piece.name} is stored as {described(stored)}, the model was built for {described(format)}.",
                fix=f"set quant.format to {stored.name if stored else 'none'}, or use another checkpoint",
                where=str(reader.path),
            )


def _fill(
    target: torch.Tensor,
    slot: Slot,
    part: Part | None,
    reader: CheckpointReader,
    sizes: ParallelSizes,
    here: Coordinates,
) -> None:
    """Fill this rank's tensor of a slot from those of its pieces that are here; part: what it is of a format."""
    view = target.view(slot.block.part_shape(sizes, here))
    if slot.block.is_expert:
        experts, *inner = slot.block.part(sizes, here)
        for piece in _local_pieces(slot, sizes, here):
            expert, *row = piece.index
            # What is left of the part's index after the expert (and gate or up) has been chosen.
            local = view[(expert - experts.start, *row)]
            _copy(local, piece, part, reader, *inner[len(row) :])
        return
    index = slot.block.part(sizes, here)
    dimensions = len(index) - len(slot.pieces[0].shape) + 1
    view.zero_()  # The rows that pad a vocabulary come from no piece.
    for piece in slot.pieces:
        rows = torch.full(slot.block.shape[:dimensions], -1)
        rows[piece.index].copy_(torch.arange(piece.shape[0]).view(rows[piece.index].shape))
        mine = rows[index[:dimensions]]
        numbers = mine[mine >= 0]
        if not len(numbers):
            continue
        # What a rank has of one piece lies together there: a run of rows, or of heads.
        span = slice(int(numbers[0]), int(numbers[-1]) + 1)
        local = torch.empty(len(numbers), *view.shape[dimensions:], dtype=target.dtype)
        _copy(local, piece, part, reader, span, *index[dimensions:])
        view[(mine >= 0).to(view.device)] = local.to(view.device)


def _copy(target: torch.Tensor, piece: Piece, part: Part | None, reader: CheckpointReader, *index: slice) -> None:
    """Copy what `index` leaves of a tensor of the checkpoint into `target`, which may be of another float type."""
    where = str(reader.path)
    if piece.name not in reader and not reader.is_quantized(piece.name):
        raise ConfigError(
            f"the checkpoint has no {piece.name}.", fix="use a complete checkpoint of this model", where=where
        )
    found = part.shape(reader.weight_shape(piece.name)) if part else reader.shape(piece.name)
    if found != piece.shape:
        raise ConfigError(
            f"{piece.name} has shape {found}, but config.json means {piece.shape}.",
            fix="use config.json and weights of the same model",
            where=where,
        )
    target.copy_(reader.part(piece.name, part, *index) if part else reader.get(piece.name, *index))


@torch.no_grad()
def export_hf(
    model: torch.nn.Module, architecture: MoeArchitecture, *, merge_adapters: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, full tensor) of every weight, in the order of the layers; in the dtype of the model, or the slot's.

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
        for kind in sorted({slot.dtype or dtype for slot in of_layer}, key=str):
            alike = [slot for slot in of_layer if (slot.dtype or dtype) == kind]
            full = gather_slots(alike, local, layers=layers, sizes=sizes, ranks=ranks, dtype=kind, device=device)
            if torch.distributed.get_rank() == 0:
                for slot, tensor in zip(alike, full, strict=True):
                    for piece in slot.pieces:
                        yield piece.name, tensor[piece.index].reshape(piece.shape)


def _float_weight(model: torch.nn.Module, path: str, merge_adapters: bool) -> torch.Tensor:
    """This rank's part of a base weight, dequantized and (if asked) with its adapter."""
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    if not isinstance(module, AdaptedModule):
        return find_tensor(model, path)
    weight = module.dense(name)
    if merge_adapters and hasattr(module, f"{name}_lora_A"):
        a, b = (getattr(module, f"{name}_lora_{matrix}").float() for matrix in "AB")
        weight = weight.float() + module.scaling * (b @ a)
    return weight
