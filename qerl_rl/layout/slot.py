"""One tensor of the Megatron model: how it is split over ranks, and which named tensors it consists of."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import torch

from qerl_rl.layout.blocks import Block, ParallelSizes
from qerl_rl.quant.formats import Part

FIRST_STAGE = -1
"""The `layer` of what lies before the layers; `architecture.layers` is the one of what follows them."""


@dataclass(frozen=True)
class Piece:
    """A named tensor [shape]: `index` into the block gives its elements, in order."""

    name: str
    shape: tuple[int, ...]
    index: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Slot:
    """One Megatron tensor. `name` is relative to its layer, or to the model outside of layers."""

    layer: int
    name: str
    block: Block
    pieces: tuple[Piece, ...]
    quantizable: bool = False
    exported: bool = True
    optional: bool = False
    """A checkpoint may lack it; the tensor then keeps its first value."""
    dtype: torch.dtype | None = None
    """Where it is not the type of the other weights."""

    def part(self, part: Part) -> Slot:
        """The slot of one part of this weight's format; its pieces keep the names of the weights.

        Raises: ValueError when rows can't be cut into the part.
        """
        columns = len(self.block.shape) - 1
        split_dim = None if part.columns == 0 and self.block.split_dim == columns else self.block.split_dim
        block = replace(self.block, shape=part.shape(self.block.shape), split_dim=split_dim)
        # A stack has three pieces an expert, of two shapes.
        shapes = {shape: part.shape(shape) for shape in {piece.shape for piece in self.pieces}}
        pieces = tuple(Piece(piece.name, shapes[piece.shape], piece.index) for piece in self.pieces)
        return replace(self, name=self.name + part.suffix, block=block, pieces=pieces)

    def stage(self, layers: int, sizes: ParallelSizes) -> int:
        """The pipeline stage that holds it."""
        return bisect_right(sizes.first_layers(layers), min(max(self.layer, 0), layers - 1)) - 1

    def module_path(self, layers: int, sizes: ParallelSizes) -> str:
        """Dotted name of the tensor in the model of its stage."""
        if not 0 <= self.layer < layers:
            return self.name
        first = sizes.first_layers(layers)[self.stage(layers, sizes)]
        return f"decoder.layers.{self.layer - first}.{self.name}"


def find_tensor(model: torch.nn.Module, path: str) -> torch.Tensor:
    """The parameter or buffer with this dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name)
