"""Who can serve whom with which box of a full tensor; tensors that are spread alike, layer by layer, share a route."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qerl_rl.layout.holdings import Box, FullTensor, Layout


@dataclass(frozen=True)
class Demand:
    """Ranks that need box number `box`, and those that can send it: equal replicas, the near ones where there are any.

    No senders: the ranks hold it themselves.
    """

    box: int
    ranks: tuple[int, ...]
    senders: tuple[int, ...]


@dataclass(frozen=True)
class Route:
    """All demands of one full tensor.

    boxes: each lies within one holding of every rank that reads or writes it. elements: theirs. missing [ranks]:
    elements that a rank needs and does not hold. holders, needers: ranks with any part in the one or other layout.
    """

    boxes: tuple[Box, ...]
    elements: tuple[int, ...]
    demands: tuple[Demand, ...]
    missing: np.ndarray
    holders: frozenset[int]
    needers: frozenset[int]


def route(tensor: FullTensor, source: Layout, target: Layout, *, largest: int, ranks_per_node: int) -> Route:
    """The route of a tensor. Args: largest: bytes of a box that travels.

    Raises: ValueError when the source's ranks do not hold the tensor without hole or overlap.
    """
    held, needed = _boxes(tensor.name, source), _boxes(tensor.name, target)
    if not tile(list(held), tensor.shape):
        raise ValueError(f"the ranks don't hold {tensor.name} {tensor.shape} without hole or overlap: {list(held)[:4]}")
    boxes: list[Box] = []
    demands: list[Demand] = []
    missing = np.zeros(source.world_size, dtype=np.int64)
    for need, ranks in needed.items():
        missing[list(ranks)] += need.elements
        for have, holders in held.items():
            both = need.meet(have)
            if both is None:
                continue
            own = tuple(rank for rank in ranks if rank in holders)
            missing[list(own)] -= both.elements
            if own:
                demands.append(Demand(len(boxes), own, ()))
                boxes.append(both)
            others = [rank for rank in ranks if rank not in holders]
            if not others:
                continue
            groups = list(_nearest(others, holders, ranks_per_node))
            for piece in cut(both, largest // tensor.dtype.itemsize):
                demands += [Demand(len(boxes), receivers, senders) for receivers, senders in groups]
                boxes.append(piece)
    elements = tuple(box.elements for box in boxes)
    holding = frozenset(rank for ranks in held.values() for rank in ranks)
    needing = frozenset(rank for ranks in needed.values() for rank in ranks)
    return Route(tuple(boxes), elements, tuple(demands), missing, holding, needing)


def _boxes(tensor: str, layout: Layout) -> dict[Box, dict[int, None]]:
    """Every distinct box of a tensor and the ranks that hold it, in rank order."""
    found: dict[Box, dict[int, None]] = {}
    for rank in range(layout.world_size):
        for holding in layout.holdings_of(tensor, rank):
            found.setdefault(holding.box, {})[rank] = None
    return found


def tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes make up a tensor of this shape without hole or overlap."""
    if sum(box.elements for box in boxes) != Box.of(shape).elements:
        return False
    start, stop = (np.array([getattr(box, side) for box in boxes]) for side in ("start", "stop"))
    meet = (np.maximum(start[:, None], start) < np.minimum(stop[:, None], stop)).all(-1)
    return int(meet.sum()) == len(boxes)


def _nearest(
    ranks: list[int], holders: dict[int, None], ranks_per_node: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(receivers, senders): those of a node that has holders are served there, the others by any holder."""
    on_node: dict[int, list[int]] = {}
    for holder in holders:
        on_node.setdefault(holder // ranks_per_node, []).append(holder)
    near: dict[int, list[int]] = {}
    far: list[int] = []
    for rank in ranks:
        node = rank // ranks_per_node
        (near.setdefault(node, []) if node in on_node else far).append(rank)
    for node, receivers in near.items():
        yield tuple(receivers), tuple(on_node[node])
    if far:
        yield tuple(far), tuple(holders)


def cut(box: Box, largest: int) -> Iterator[Box]:
    """Boxes of at most `largest` (>= 1) elements that make up a box, in order, cut across as few dimensions as do."""
    if box.elements <= largest:
        yield box
        return
    dim = next(number for number, length in enumerate(box.shape) if length > 1)
    one = box.elements // box.shape[dim]
    step = max(largest // one, 1)
    for start in range(box.start[dim], box.stop[dim], step):
        stop = min(start + step, box.stop[dim])
        part = Box(
            (*box.start[:dim], start, *box.start[dim + 1 :]),
            (*box.stop[:dim], stop, *box.stop[dim + 1 :]),
        )
        yield from cut(part, largest)
