"""Which rows of a leased batch go to which rank and mini-batch: deterministic, groups whole in a mini-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfer_dock import Batch, SampleKey


def even_rows(count: int, parts: int) -> list[list[int]]:
    """`count` rows dealt to `parts` ranks like cards, so that the samples of a group spread over the ranks."""
    return [list(range(part, count, parts)) for part in range(parts)]


def group_rows(keys: Sequence[SampleKey], parts: int) -> list[list[int]]:
    """Rows by rank, each group whole on one rank, groups dealt like cards."""
    groups = list(dict.fromkeys((key.step, key.group) for key in keys))
    rank_of = {group: index % parts for index, group in enumerate(groups)}
    rows: list[list[int]] = [[] for _ in range(parts)]
    for row, key in enumerate(keys):
        rows[rank_of[key.step, key.group]].append(row)
    return rows


def mini_batch_rows(
    keys: Sequence[SampleKey], groups_per_mini_batch: int, epochs: int, random: np.random.Generator
) -> list[list[int]]:
    """Rows of each optimizer update: in every epoch, the groups in a new random order, cut into mini-batches."""
    by_group: dict[tuple[int, int], list[int]] = {}
    for row, key in enumerate(keys):
        by_group.setdefault((key.step, key.group), []).append(row)
    groups = list(by_group.values())
    updates = []
    for _ in range(epochs):
        order = random.permutation(len(groups))
        for begin in range(0, len(groups), groups_per_mini_batch):
            chosen = order[begin : begin + groups_per_mini_batch]
            updates.append([row for group in chosen for row in groups[group]])
    return updates


def kept_rows(updates: Sequence[Sequence[int]], kept: Sequence[bool]) -> list[list[int]]:
    """The rows of each update that are `kept`; an update without any is none."""
    left = [[row for row in update if kept[row]] for update in updates]
    return [update for update in left if update]


def update_shares(
    batch: Batch, updates: Sequence[Sequence[int]], ranks: int, *, whole_groups: bool = False
) -> list[list[Batch]]:
    """For each data-parallel rank its part of every update; with `whole_groups` no group is parted."""
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    for rows in updates:
        dealt = group_rows([batch.keys[row] for row in rows], ranks) if whole_groups else even_rows(len(rows), ranks)
        parts = [[rows[i] for i in part] for part in dealt]
        for rank, part in enumerate(batch.split(parts)):
            shares[rank].append(part)
    return shares
