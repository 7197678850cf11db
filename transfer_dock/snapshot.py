"""A book as plain data, and back. What can be counted or looked up from the rest is not stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer_dock.columns import DIGEST_BYTES, Layout
from transfer_dock.keys import SampleKey, pack_keys, unpack_keys
from transfer_dock.records import Block, Extent, Group, LeaseRecord, ReservationRecord, Sample

if TYPE_CHECKING:
    from transfer_dock.book import Book


def save(book: Book) -> dict[str, Any]:
    keys = sorted(book.samples)
    samples = [book.samples[key] for key in keys]
    blocks = {block: None for sample in samples for block, _, _ in sample.places.values()}
    ordered = sorted(blocks, key=lambda block: (block.extent.node, block.extent.offset, block.offset, block.column))
    numbers = {block: number for number, block in enumerate(ordered)}
    groups = sorted(book.groups)
    seen = [SampleKey(*group, index) for group in groups for index in sorted(book.groups[group].indices)]
    ages = [(*group, book.groups[group].age) for group in groups]
    consumers = {name: list(columns) for name, columns in book.settings.consumers.items()}
    return {
        "settings": [dict(book.settings.dtypes), consumers, book.settings.samples_per_group],
        "ticket": book.last_ticket,
        "keys": pack_keys(keys),
        "columns": [
            _column(book, column, samples, numbers) for column in book.settings.dtypes if column in book.layouts
        ],
        "acked": {name: _pairs(sample.acked.get(name) for sample in samples) for name in book.settings.consumers},
        "blocks": [[b.extent.node, b.extent.offset, b.column, b.offset, b.nbytes] for b in ordered],
        "extents": [[extent.node, extent.offset, extent.size] for _, extent in sorted(book.memory.extents.items())],
        "highest": dict(sorted(book.memory.highest.items())),
        "groups": _table(ages, 3),
        "seen": pack_keys(seen),
        "closed_steps": sorted(book.closed_steps),
        "last_request": list(book.last_request),
        "producers": {column: [list(holder) for holder in book.producers[column]] for column in sorted(book.producers)},
        # The arguments of the transitions that make them.
        "reservations": [_reservation(ticket, record) for ticket, record in sorted(book.reservations.items())],
        "leases": [_lease(ticket, record) for ticket, record in sorted(book.leases.items())],
        "partly": [[ticket, pack_keys(sorted(r.partly))] for ticket, r in sorted(book.leases.items()) if r.partly],
    }


def _reservation(ticket: int, record: ReservationRecord) -> list[Any]:
    offset = None if record.extent is None else record.extent.offset
    memory = [record.nbytes, record.node, offset, record.size]
    return [ticket, record.columns, *memory, _plain(record.holder), record.request_id, _table(record.entering, 2)]


def _lease(ticket: int, record: LeaseRecord) -> list[Any]:
    parts = [[ticket, pack_keys(list(record.held)), None if record.tag is None else record.tag.rank]]
    holder, tag = _plain(record.holder), _plain(record.tag)
    return [record.consumer, record.whole_groups, holder, record.request_id, tag, parts]


def _column(book: Book, column: str, samples: Sequence[Sample], numbers: Mapping[Block, int]) -> list[Any]:
    """Name, layout, [rows among the samples, digests], and for the readable ones [row, block, start, length]."""
    jagged, row_shape = book.layouts[column]
    rows = [row for row, sample in enumerate(samples) if column in sample.digests]
    digests = b"".join([samples[row].digests[column] for row in rows])
    places = [
        (row, numbers[block], start, length)
        for row in rows
        if column in samples[row].places
        for block, start, length in (samples[row].places[column],)
    ]
    return [column, jagged, list(row_shape), np.array(rows, np.int64), digests, _table(places, 4)]


def _table(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(len(rows), width)


def _pairs(marks: Iterable[int | None]) -> np.ndarray:
    return _table([(row, mark) for row, mark in enumerate(marks) if mark is not None], 2)


def _plain(fields: Sequence[Any] | None) -> list[Any] | None:
    return None if fields is None else list(fields)


def load(book: Book, state: Mapping[str, Any]) -> None:
    """Fill an empty book."""
    memory = book.memory
    extents = {(node, offset): memory.hold(node, offset, size) for node, offset, size in state["extents"]}
    load_samples(book, state, extents)
    book.producers = {name: dict.fromkeys(map(tuple, holders)) for name, holders in state["producers"].items()}
    for reservation in state["reservations"]:
        book.apply("reserve", reservation)
    for lease in state["leases"]:
        book.apply("lease", lease)
    for ticket, packed in state["partly"]:
        book.leases[ticket].partly.update(unpack_keys(packed))
    book.last_ticket = state["ticket"]
    request_id, answer = state["last_request"]
    book.last_request = (request_id, answer)
    memory.highest = dict(state["highest"])


def load_samples(book: Book, state: Mapping[str, Any], extents: Mapping[tuple[str, int], Extent]) -> None:
    """Fill a book without samples with those of a state, none of them leased. `extents`: where each of the state's
    extents (node, offset) is now."""
    book.closed_steps = set(state["closed_steps"])
    for step, group, age in state["groups"].tolist():
        book.groups[step, group] = Group(age=age)
    for step, group, index in state["seen"].tolist():
        book.groups[step, group].indices.add(index)
    keys = unpack_keys(state["keys"])
    consumers = book.settings.consumers
    reads = {consumer: len(columns) for consumer, columns in consumers.items()}
    samples = [Sample(dict(reads), len(reads)) for _ in keys]
    book.samples = dict(zip(keys, samples, strict=True))
    for consumer, marks in state["acked"].items():
        for row, mark in marks.tolist():
            samples[row].acked[consumer] = mark
            samples[row].left -= 1
            counts = book.acked_counts if mark else book.dropped_counts
            counts[consumer] += 1
    for key, sample in zip(keys, samples, strict=True):
        book.groups[key[:2]].held += 1
        if sample.left:
            book.open_groups[key[:2]] += 1
    book.ages = Counter(group.age for group in book.groups.values() if group.held)
    blocks = []
    for node, place, column, offset, nbytes in state["blocks"]:
        extent = extents[node, place]
        blocks.append(Block(extent, column, extent.offset + offset - place, nbytes))
    for column in state["columns"]:
        _load_column(book, keys, samples, blocks, *column)
    for block in blocks:
        book.memory.need(block, block.live)
    for consumer, pool in book.pools.items():
        pairs = zip(keys, samples, strict=True)
        pool.add([key for key, sample in pairs if not sample.missing[consumer] and consumer not in sample.acked])


def _load_column(
    book: Book,
    keys: Sequence[SampleKey],
    samples: Sequence[Sample],
    blocks: Sequence[Block],
    column: str,
    jagged: bool,
    row_shape: Sequence[int],
    rows: np.ndarray,
    digests: bytes,
    places: np.ndarray,
) -> None:
    book.layouts[column] = Layout(jagged, tuple(row_shape))
    book.column_counts[column] = len(rows)
    for position, row in enumerate(rows.tolist()):
        sample, group = samples[row], book.groups[keys[row][:2]]
        sample.digests[column] = digests[position * DIGEST_BYTES : (position + 1) * DIGEST_BYTES]
        group.columns[column] = group.columns.get(column, 0) + 1
        book.groups_complete[column] += group.columns[column] == book.settings.samples_per_group
        for consumer in book.readers[column]:
            sample.missing[consumer] -= 1
    for row, number, start, length in places.tolist():
        samples[row].places[column] = (blocks[number], start, length)
        blocks[number].live += 1
