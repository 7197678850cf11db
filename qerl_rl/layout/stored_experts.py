"""Frozen experts as one engine keeps them in memory, described for another that would read them there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class StoredExperts:
    """One weight of some experts of a layer on this rank.

    name: the full tensor's, as resharding has it (model.layers.L.mlp.experts.w13, ... w2). experts: their numbers in
    the model, in the order of the tensors. share: (which, of how many) equal parts of each expert's intermediate size
    this is. format: what reads the tensors. tensors: its parts, in its order, one row of dimension 0 an expert; they
    are never written, and never leave memory while somebody else reads them.
    """

    name: str
    experts: range
    share: tuple[int, int]
    format: Format
    tensors: tuple[torch.Tensor, ...]

    def some(self, first: int, count: int) -> tuple[torch.Tensor, ...]:
        """The tensors (views) of `count` experts from the model's number `first` on, which must be among these."""
        begin = self.experts.index(first)
        return tuple(tensor[begin : begin + count] for tensor in self.tensors)
