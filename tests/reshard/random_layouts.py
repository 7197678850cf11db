"""Layouts that no engine has: tensors cut anywhere, any set of replicas, fused, stacked or apart in a rank's memory."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from qerl_rl.layout.holdings import Box, FullTensor, Holding

DTYPES = (torch.int8, torch.int32, torch.uint8, torch.bfloat16, torch.float32, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Piece:
    """A part of a dimension of a pair of tensors, the ranks that hold it, and how the pair lies in one tensor there."""

    pair: tuple[FullTensor, FullTensor]
    box: Box
    ranks: frozenset[int]
    form: str

    @property
    def name(self) -> str:
        return f"{self.pair[0].name}+{self.box.start}"

    def holdings(self) -> list[Holding]:
        shape = self.box.shape
        everything = tuple(slice(0, length) for length in shape)
        if self.form == "apart":
            return [
                Holding(tensor.name, self.box, f"{self.name}.{number}", shape, everything)
                for number, tensor in enumerate(self.pair)
            ]
        if self.form == "stacked":
            return [
                Holding(tensor.name, self.box, self.name, (2, *shape), (number, *everything))
                for number, tensor in enumerate(self.pair)
            ]
        rows = shape[0]
        return [
            Holding(
                tensor.name,
                self.box,
                self.name,
                (2 * rows, *shape[1:]),
                (slice(number * rows, (number + 1) * rows), *everything[1:]),
            )
            for number, tensor in enumerate(self.pair)
        ]

    def local_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.form == "apart":
            return {f"{self.name}.{number}": self.box.shape for number in range(2)}
        # Flat, so that the holdings' views have something to do.
        return {self.name: (2 * self.box.elements,)}


@dataclass(frozen=True)
class RandomLayout:
    """Pieces that tile each tensor; a Layout."""

    world_size: int
    pieces: tuple[Piece, ...]

    def pattern(self, tensor: str) -> str:
        return tensor

    def holdings(self, rank: int) -> list[Holding]:
        return [holding for piece in self.pieces if rank in piece.ranks for holding in piece.holdings()]

    def holdings_of(self, tensor: str, rank: int) -> list[Holding]:
        return [holding for holding in self.holdings(rank) if holding.tensor == tensor]

    def local_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        held = [piece for piece in self.pieces if rank in piece.ranks]
        return {name: shape for piece in held for name, shape in piece.local_shapes().items()}


def random_pairs(seed: int, pairs: int = 3) -> list[tuple[FullTensor, FullTensor]]:
    """Pairs of tensors of 1 to 4 dimensions, of all types that a checkpoint has, a layer a pair."""
    random = Random(seed)
    found = []
    for layer in range(pairs):
        shape = tuple(random.randint(1, 6) for _ in range(random.randint(1, 4)))
        dtype = random.choice(DTYPES)
        found.append(tuple(FullTensor(f"{layer}.{name}", shape, dtype, layer) for name in ("gate", "up")))
    return found


def random_layout(pairs: list[tuple[FullTensor, FullTensor]], world_size: int, seed: int) -> RandomLayout:
    """Each pair is cut along one dimension at random places; each part lies on one or more ranks."""
    random = Random(seed)
    pieces = []
    for pair in pairs:
        shape = pair[0].shape
        dim = random.randrange(len(shape))
        inner = [cut for cut in range(1, shape[dim]) if random.random() < 0.4]
        for start, stop in zip([0, *inner], [*inner, shape[dim]], strict=True):
            box = Box(
                tuple(start if d == dim else 0 for d in range(len(shape))),
                tuple(stop if d == dim else length for d, length in enumerate(shape)),
            )
            ranks = frozenset(random.sample(range(world_size), random.randint(1, min(4, world_size))))
            pieces.append(Piece(pair, box, ranks, random.choice(["apart", "stacked", "fused"])))
    return RandomLayout(world_size, tuple(pieces))


def random_values(tensor: FullTensor) -> torch.Tensor:
    """Any bits, the same in every process."""
    generator = torch.Generator().manual_seed(sum(map(ord, tensor.name)))
    nbytes = Box.of(tensor.shape).elements * tensor.dtype.itemsize
    raw = torch.randint(0, 256, (nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(tensor.dtype).view(tensor.shape)
