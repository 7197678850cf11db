"""The full tensors of a checkpoint, put together without the layouts that they test."""

from __future__ import annotations

import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.slots import weight_slots
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.quant.checkpoint import CheckpointReader


def full_weights(reader: CheckpointReader, architecture: MoeArchitecture, weights: Weights) -> dict[str, torch.Tensor]:
    """Every full tensor by name, as stored (floats in the dtype of `weights`)."""
    parts: dict[str, torch.Tensor] = {}
    for slot in weight_slots(architecture, ParallelSizes()):
        format, stack = weights.formats.get((slot.layer, slot.name)), slot.name.rpartition(".")[2]
        stored = [
            reader.parts(piece.name) if format else {"": reader.get(piece.name).to(weights.dtype)}
            for piece in slot.pieces
        ]
        for suffix in stored[0]:
            pieces = [part[suffix] for part in stored]
            if not slot.block.is_expert:
                parts |= {piece.name + suffix: part for piece, part in zip(slot.pieces, pieces, strict=True)}
                continue
            # An expert's gate and up follow each other among the pieces.
            together = torch.stack(pieces).unflatten(0, slot.block.shape[: 2 if stack == "w13" else 1])
            parts[f"model.layers.{slot.layer}.mlp.experts.{stack}{suffix}"] = together
    return {tensor.name: parts[tensor.name].reshape(tensor.shape) for tensor in full_tensors(architecture, weights)}
