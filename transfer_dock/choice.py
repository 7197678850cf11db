"""Which samples a get is given, and where they lie. Functions of the book that change nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from transfer_dock.balance import balanced_parts
from transfer_dock.book import Book
from transfer_dock.columns import MSGPACK, ColumnRead, Place
from transfer_dock.errors import InvalidRequest
from transfer_dock.keys import GroupKey, SampleKey
from transfer_dock.records import Block, LeaseRequest


def fresh_groups(book: Book, max_staleness: int | None) -> Callable[[GroupKey], bool] | None:
    """Whether a group may be handed out; None when all may."""
    if max_staleness is None or max(book.ages, default=0) <= max_staleness:
        return None
    return lambda group: book.groups[group].age <= max_staleness


def stale_samples(book: Book, request: LeaseRequest) -> list[SampleKey]:
    """Available samples that the request wants finished for its consumer because their groups are too old."""
    fresh = fresh_groups(book, request.max_staleness)
    if fresh is None or request.stale != "drop":
        return []
    pool, consumer = book.pools[request.consumer], request.consumer
    groups = [group for group in pool.of_step(request.step, False) if not fresh(group)]
    if request.whole_groups:
        groups = [g for g in groups if not any(consumer in book.samples[key].leased for key in book.members(g))]
    return [key for group in groups for key in pool.members[group]]


def choose_samples(book: Book, request: LeaseRequest) -> list[SampleKey] | None:
    """The lowest keys that the request may have; None while there are fewer than its minimum."""
    fresh = fresh_groups(book, request.max_staleness)
    pool = book.pools[request.consumer]
    return pool.choose(request.count, request.minimum, request.whole_groups, request.step, fresh)


def choose_parts(book: Book, request: LeaseRequest) -> list[list[SampleKey]] | None:
    """A balanced plan: parts of `count` samples, one for each rank; without ranks as many as there are samples for.

    None while there are too few.
    """
    fresh, size = fresh_groups(book, request.max_staleness), request.count
    most, least = (sys.maxsize, size) if request.ranks is None else (size * request.ranks,) * 2
    keys = book.pools[request.consumer].choose(most, least, request.whole_groups, request.step, fresh)
    if keys is None:
        return None
    parts = len(keys) // size
    del keys[parts * size :]
    unit = book.settings.samples_per_group if request.whole_groups else 1
    units = [keys[first : first + unit] for first in range(0, len(keys), unit)]
    tokens = _tokens(book, units, token_columns(book, request.consumer))
    return [[key for index in part for key in units[index]] for part in balanced_parts(tokens, parts)]


def token_columns(book: Book, consumer: str) -> list[str]:
    """The columns whose lengths are a sample's tokens. Raises: InvalidRequest when one has fixed-size rows."""
    for column in book.settings.token_columns:
        if column in book.layouts and not book.layouts[column].jagged:
            raise InvalidRequest(f"token column {column!r} holds {book.layouts[column]}; tokens are counted by length")
    if book.settings.token_columns:
        return list(book.settings.token_columns)
    reads, dtypes = book.settings.consumers[consumer], book.settings.dtypes
    numeric = [column for column in reads if dtypes[column] not in MSGPACK and column in book.layouts]
    return [column for column in numeric if book.layouts[column].jagged]


def _tokens(book: Book, units: Sequence[Sequence[SampleKey]], columns: Sequence[str]) -> list[int]:
    if not columns:
        return [len(unit) for unit in units]
    totals = []
    for unit in units:
        places = [book.samples[key].places for key in unit]
        totals.append(sum(found[column][2] for found in places for column in columns if column in found))
    return totals


def read_columns(book: Book, keys: Sequence[SampleKey], columns: Sequence[str]) -> dict[str, ColumnRead]:
    samples, found = [book.samples[key] for key in keys], {}
    for column in columns:
        places = [sample.places[column] for sample in samples]
        numbers: dict[Block, int] = {}
        block = [numbers.setdefault(block, len(numbers)) for block, _, _ in places]
        found[column] = ColumnRead(
            book.settings.dtypes[column],
            book.layouts[column],
            [Place(b.extent.node, b.extent.offset, b.extent.size, b.offset, b.nbytes) for b in numbers],
            np.array(block, np.int64),
            np.array([start for _, start, _ in places], np.int64),
            np.array([length for _, _, length in places], np.int64),
        )
    return found
