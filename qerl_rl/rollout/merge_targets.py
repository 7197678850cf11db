"""Which weights of a checkpoint each adapter of the exchange format changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from qerl_rl.quant.checkpoint import CheckpointReader

GATE_UP_DOWN = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What an expert's weights are called: in most families, and in Mixtral."""


@dataclass(frozen=True)
class Target:
    """A weight stem.weight [N, K] of the checkpoint, and its adapter: rows `rows` of B (of `expert`, where A and B are
    stacked), all of A. columns: K."""

    stem: str
    adapter: str
    rows: slice
    columns: int
    expert: int | None = None

    def factors(self, tensors: Mapping[str, torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 (A [rank, K], B [N, rank] times `scale`) out of full adapters in the exchange format.

        Raises: ValueError when they are of another shape.
        """
        a, b = tensors[f"{self.adapter}.lora_A"], tensors[f"{self.adapter}.lora_B"]
        if self.expert is not None:
            a, b = a[self.expert], b[self.expert]
        b = b[self.rows]
        if a.shape != (b.shape[1], self.columns) or b.shape[0] != self.rows.stop - self.rows.start:
            raise ValueError(
                f"adapter {self.adapter}: A {tuple(a.shape)} and B {tuple(b.shape)} don't fit {self.stem}, which has "
                f"{self.rows.stop - self.rows.start} rows of {self.columns}"
            )
        return a.to(torch.float32), b.to(torch.float32) * scale


class TargetFinder:
    """Finds the targets of an adapter by the names and shapes in a checkpoint."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader
        self.tensors: dict[str, list[str]] = {}
        """By stem: the weight and bias of the module, as an unquantized checkpoint would name them."""
        for name in reader.weights():
            self.tensors.setdefault(name.rpartition(".")[0], []).append(name)

    def shape(self, stem: str) -> tuple[int, int]:
        """Of the weight [N, K], whatever it is stored as. Raises: KeyError when there is no such module."""
        weight = f"{stem}.weight"
        format = self._reader.format_of(weight)
        if format is None:
            rows, columns = self._reader.shape(weight)
            return rows, columns
        rows, stored = self._reader.shape(weight + format.parts[0].suffix)
        return rows, stored * format.parts[0].columns

    def fused(self, adapter: str, stems: list[str], expert: int | None = None) -> Iterator[Target]:
        """The targets of an adapter of modules that are fused by their rows, in this order."""
        first = 0
        for stem in stems:
            count, columns = self.shape(stem)
            yield Target(stem, adapter, slice(first, first + count), columns, expert)
            first += count

    def attention(self, layer: str, kind: str) -> list[Target]:
        """Of qkv_proj or o_proj of `layer` (model.layers.N)."""
        parent = f"{layer}.self_attn"
        stems = [f"{parent}.{part}_proj" for part in "qkv"] if kind == "qkv_proj" else [f"{parent}.{kind}"]
        return list(self.fused(f"{parent}.{kind}", stems))

    def experts(self, layer: str, numbers: list[int]) -> list[Target]:
        """Of the experts `numbers` of `layer`, gate, up and down of each."""
        parent, names = next(
            (parent, names)
            for parent, names in zip((f"{layer}.mlp", f"{layer}.block_sparse_moe"), GATE_UP_DOWN, strict=True)
            if f"{parent}.experts.0.{names[2]}" in self.tensors
        )
        adapter, targets = f"{layer}.mlp.experts", []
        for expert in numbers:
            gate, up, down = (f"{parent}.experts.{expert}.{name}" for name in names)
            targets += [*self.fused(f"{adapter}.w13", [gate, up], expert), *self.fused(f"{adapter}.w2", [down], expert)]
        return targets

    def shared_expert(self, layer: str, kind: str) -> list[Target]:
        """Of gate_up_proj or down_proj of the shared expert of `layer`."""
        parent = f"{layer}.mlp.shared_expert"
        kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        return list(self.fused(f"{parent}.{kind}", [f"{parent}.{name}" for name in kinds]))
