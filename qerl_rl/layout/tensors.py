"""The full tensors of a model: what two layouts have in common, each named and shaped as no engine holds it.

Weights go by their HF names, the rows of q, k and v as [heads, head_dim]; the experts of a layer are one tensor each of
`mlp.experts.w13` [experts, gate or up, intermediate, hidden] and `mlp.experts.w2` [experts, hidden, intermediate]. A
quantized weight is as many full tensors as its format has parts. Adapters go by the names of the exchange format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.holdings import FullTensor
from qerl_rl.layout.slots import Piece, Slot, adapter_slots, weight_slots
from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class Weights:
    """All weights of a model. formats: of those that are quantized, by layer and name of their slot.

    dtype: what the others travel in.
    """

    formats: Mapping[tuple[int, str], Format] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def chosen_by(
        cls,
        architecture: MoeArchitecture,
        format_of: Callable[[str], Format | None],
        dtype: torch.dtype = torch.bfloat16,
    ) -> Weights:
        """With the format that `format_of` gives for the HF name of a weight; fused weights must have the same."""
        formats = {}
        for slot in weight_slots(architecture, ParallelSizes()):
            format = format_of(slot.pieces[0].name) if slot.quantizable else None
            if format is not None:
                formats[slot.layer, slot.name] = format
        return cls(formats, dtype)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a LoraConfig; dtype: what they travel in."""

    lora: LoraConfig
    dtype: torch.dtype = torch.float32


Tensors = Weights | Adapters


@dataclass(frozen=True)
class Entry:
    """A full tensor and the slot of the training engine that it is a piece of (None: the whole slot)."""

    tensor: FullTensor
    slot: Slot
    piece: Piece | None

    @property
    def is_grouped(self) -> bool:
        """Whether the slot interleaves groups of heads of this tensor with others' (the queries of a fused qkv)."""
        index = self.piece.index if self.piece else ()
        return len(index) > 1 and isinstance(index[1], slice)


def full_tensors(architecture: MoeArchitecture, tensors: Tensors) -> list[FullTensor]:
    """Every full tensor once, in the order of the model; a tied output layer is the embedding."""
    found = entries(architecture, tensors, ParallelSizes())
    return list({entry.tensor.name: entry.tensor for entry in found}.values())


def entries(architecture: MoeArchitecture, tensors: Tensors, sizes: ParallelSizes) -> list[Entry]:
    """Every piece of every slot, in the order of the model; a tied output layer repeats the embedding."""
    if isinstance(tensors, Adapters):
        slots = adapter_slots(architecture, tensors.lora)
        return [entry for slot in slots for entry in _entries(slot, "", tensors.dtype)]
    found = []
    for slot in weight_slots(architecture, sizes):
        format = tensors.formats.get((slot.layer, slot.name))
        if format is None:
            found += _entries(slot, "", slot.dtype or tensors.dtype)
        for part in format.parts if format else ():
            found += _entries(slot.part(part), part.suffix, part.dtype)
    return found


def _entries(slot: Slot, suffix: str, dtype: torch.dtype) -> list[Entry]:
    if slot.block.is_expert:
        return [Entry(FullTensor(_stack_name(slot, suffix), slot.block.shape, dtype, slot.layer, True), slot, None)]
    return [
        Entry(FullTensor(piece.name + suffix, _shape(slot, piece), dtype, slot.layer), slot, piece)
        for piece in slot.pieces
    ]


def _stack_name(slot: Slot, suffix: str) -> str:
    """Of a stack over all experts: an adapter is one piece already, a weight has three an expert."""
    if len(slot.pieces) == 1 and not slot.pieces[0].index:
        return slot.pieces[0].name
    return f"model.layers.{slot.layer}.{slot.name.removesuffix(suffix)}{suffix}"


def _shape(slot: Slot, piece: Piece) -> tuple[int, ...]:
    """What the piece's index leaves of the block, groups of heads and heads of a group as one dimension."""
    kept: list[int] = []
    for index, length in zip(piece.index, slot.block.shape, strict=False):
        if isinstance(index, slice):
            kept.append(len(range(length)[index]))
    if len(kept) > 1:
        kept = [kept[0] * kept[1]]
    return (*kept, *slot.block.shape[len(piece.index) :])
