"""Full tensors put into a live engine: each rank cuts out what it holds. The resharding moves shards instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from qerl_rl.layout.holdings import FullTensor, Layout


def exchange_format(tensors: list[FullTensor], adapters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters of the exchange format as the full tensors `tensors`: q, k and v apart, rows as heads, gate and up.

    Raises: ValueError when one is missing, unknown or of another shape.
    """
    expected: dict[str, list[FullTensor]] = {}
    for tensor in tensors:
        expected.setdefault(tensor.name.partition(":")[0], []).append(tensor)
    if adapters.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - adapters.keys())[:3], sorted(adapters.keys() - expected.keys())[:3]
        raise ValueError(f"adapters don't fit the engine: missing {missing or 'none'}, unknown {unknown or 'none'}")
    found = {}
    for name, pieces in expected.items():
        whole, columns = adapters[name], pieces[0].shape[-1]
        sizes = [math.prod(tensor.shape[:-1]) for tensor in pieces]
        if whole.shape[-1] != columns or math.prod(whole.shape[:-1]) != sum(sizes):
            needed = f"{sum(sizes)} rows of {columns}"
            raise ValueError(f"adapter {name} {tuple(whole.shape)} doesn't fit the engine, which needs {needed}")
        for tensor, rows in zip(pieces, whole.reshape(-1, columns).split(sizes), strict=True):
            found[tensor.name] = rows.view(tensor.shape)
    return found


def put(target: Any, layout: Layout, rank: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a `Target` on `rank` from full tensors, and complete it."""
    holdings = layout.holdings(rank)
    for holding in holdings:
        holding.take(target.write(holding.local)).copy_(tensors[holding.tensor][holding.box.slices])
    for local in dict.fromkeys(holding.local for holding in holdings):
        target.complete(local)
