"""The name of a sample, and how lists of them are written in messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from transfer_dock.errors import InvalidRequest


class SampleKey(NamedTuple):
    """One sample: response `index` of prompt `group` in training step `step`. Orders as written."""

    step: int
    group: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a key


GroupKey = tuple[int, int]
"""(step, group)"""


def group_of(key: SampleKey) -> GroupKey:
    return key.step, key.group


def pack_keys(keys: Sequence[SampleKey]) -> np.ndarray:
    """[S, 3] int64: what goes between processes; pickling thousands of named tuples costs more than all the rest."""
    if not len(keys):
        return np.zeros((0, len(SampleKey._fields)), np.int64)
    try:
        packed = np.array(keys, np.int64)
    except (TypeError, ValueError):
        packed = np.zeros(0, np.int64)
    if packed.shape != (len(keys), len(SampleKey._fields)):
        raise InvalidRequest(f"keys are SampleKey(step, group, index) of whole numbers, got {list(keys)[:2]}")
    return packed


def unpack_keys(packed: np.ndarray) -> list[SampleKey]:
    return [SampleKey._make(row) for row in packed.tolist()]


def _ranges(indices: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def describe_keys(keys: Iterable[SampleKey], groups_shown: int = 4) -> str:
    """`step 1: group 0 [0-7], group 3 [2]`, cut after `groups_shown` groups."""
    by_group = [(group, [key.index for key in members]) for group, members in groupby(sorted(keys), key=group_of)]
    text, last_step = "", None
    for (step, group), indices in by_group[:groups_shown]:
        lead = ("; " if text else "") + f"step {step}: " if step != last_step else ", "
        text += f"{lead}group {group} [{_ranges(indices)}]"
        last_step = step
    rest = len(by_group) - groups_shown
    return text + (f" and {rest} more groups" if rest > 0 else "")
