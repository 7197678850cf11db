"""What a put, a get or a restore may not ask for. Functions of the book that change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer_dock.book import Book
from transfer_dock.choice import token_columns
from transfer_dock.columns import ColumnWrite, lay_out
from transfer_dock.errors import (
    ColumnMismatch,
    ConflictingPut,
    InvalidRequest,
    StepClosed,
    UnknownColumn,
    UnknownConsumer,
    unknown_name,
)
from transfer_dock.keys import GroupKey, SampleKey, describe_keys
from transfer_dock.records import LeaseRequest, Settings


def check_keys(book: Book, keys: Sequence[SampleKey]) -> None:
    """Raises: InvalidRequest for a repeated key or a group that gets too large, StepClosed."""
    if len(set(keys)) != len(keys):
        raise InvalidRequest("a key appears twice in one put")
    added: dict[GroupKey, set[int]] = {}
    for key in keys:
        name: GroupKey = key[:2]
        group = book.groups.get(name)
        # An index that was put but is not held left with its step, when that was closed.
        if key[0] in book.closed_steps or (group is not None and key[2] in group.indices and key not in book.samples):
            raise StepClosed(f"{describe_keys([key])} left the dock when its step was closed; it can't be put again")
        added.setdefault(name, set()).add(key[2])
    size = book.settings.samples_per_group
    for name, indices in added.items():
        known = book.groups[name].indices if name in book.groups else set()
        if len(known | indices) > size:
            text = f"step {name[0]} group {name[1]} would have {len(known | indices)} samples"
            raise InvalidRequest(f"{text}; the dock was created with samples_per_group={size}")


def new_columns(book: Book, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> list[str]:
    """The columns of a put that bring anything new. Raises: UnknownColumn, ColumnMismatch, ConflictingPut."""
    dtypes, found = book.settings.dtypes, []
    held = [(row, sample.digests) for row, key in enumerate(keys) if (sample := book.samples.get(key))]
    for column, write in writes.items():
        if column not in dtypes:
            raise UnknownColumn(unknown_name("column", column, dtypes))
        if len(write.start) != len(keys):
            raise ColumnMismatch(f"column {column!r} has {len(write.start)} rows for {len(keys)} keys")
        layout = book.layouts.get(column, write.layout)
        if layout != write.layout:
            raise ColumnMismatch(f"column {column!r} holds {layout} already, this put has {write.layout}")
        known = [(row, digests[column]) for row, digests in held if column in digests]
        if rows := [row for row, digest in known if digest != write.digest(row)]:
            conflicts = describe_keys(keys[row] for row in rows)
            raise ConflictingPut(f"column {column!r} was put before with another value: {conflicts}")
        if len(known) < len(keys):
            found.append(column)
    return found


def wants_digests(book: Book, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite]) -> bool:
    """Whether a put without digests repeats something: then it takes digests to see if it is the same."""
    bare = [column for column, write in writes.items() if not write.digests]
    held = [sample.digests for key in keys if (sample := book.samples.get(key))]
    return any(column in digests for digests in held for column in bare)


def entered_groups(book: Book, keys: Sequence[SampleKey]) -> list[GroupKey]:
    """The groups into which a put of `keys` brings samples that the dock does not hold."""
    return list(dict.fromkeys([key[:2] for key in keys if key not in book.samples]))


def check_size(
    book: Book, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite], columns: Sequence[str], arena: int
) -> None:
    """Raises: InvalidRequest when the dock could never have room for these columns."""
    nbytes, capacity = sum(writes[column].nbytes for column in columns), book.settings.capacity_bytes
    if nbytes > capacity or lay_out(writes, columns)[1] > arena:
        text = f"a put of {nbytes} bytes can never fit into capacity_bytes={capacity}"
        raise InvalidRequest(f"{text}; put fewer samples at once or create the dock with more")
    groups, most = len(entered_groups(book, keys)), book.settings.capacity_groups
    if most is not None and groups > most:
        text = f"a put of samples of {groups} groups can never fit into capacity_groups={most}"
        raise InvalidRequest(f"{text}; put fewer groups at once or create the dock with more")


def check_request(book: Book, request: LeaseRequest) -> None:
    """Raises: UnknownConsumer, InvalidRequest, StepClosed when no lease can ever come of the request."""
    consumer, count, minimum, settings = request.consumer, request.count, request.minimum, book.settings
    if consumer not in settings.consumers:
        raise UnknownConsumer(unknown_name("consumer", consumer, settings.consumers))
    size, get = settings.samples_per_group, f"get({consumer!r})"
    if not 1 <= minimum <= count:
        raise InvalidRequest(f"{get} needs 1 <= minimum <= count, got minimum={minimum}, count={count}")
    if request.whole_groups and (count % size or minimum % size):
        text = f"{get} of whole groups takes multiples of samples_per_group={size}"
        raise InvalidRequest(f"{text}, got count={count}, minimum={minimum}")
    if request.stale not in ("wait", "drop"):
        raise InvalidRequest(f"{get} takes stale='wait' or 'drop', got {request.stale!r}")
    if request.max_staleness is not None and request.max_staleness < 0:
        raise InvalidRequest(f"{get} needs max_staleness >= 0, got {request.max_staleness}")
    _check_balance(book, request, get)
    if request.step in book.closed_steps:
        raise StepClosed(f"{get} asks for samples of step {request.step}, which is closed")


def _check_balance(book: Book, request: LeaseRequest, get: str) -> None:
    rank, ranks = request.rank, request.ranks
    if rank is not None or ranks is not None:
        if not request.balance:
            raise InvalidRequest(f"{get} takes rank and ranks only for balanced parts")
        if rank is None or ranks is None or not 0 <= rank < ranks:
            raise InvalidRequest(f"{get} takes rank and ranks together, 0 <= rank < ranks; got {rank} and {ranks}")
    if request.balance:
        if request.minimum != request.count:
            text = f"{get} of balanced parts takes exactly `count` samples"
            raise InvalidRequest(f"{text}, got minimum={request.minimum}, count={request.count}")
        token_columns(book, request.consumer)


def check_restore(book: Book, state: Mapping[str, Any], moved: Sequence[tuple[str, int, str, int]]) -> None:
    """Raises: InvalidRequest when `Ledger.restore` can't take a saved state over."""
    if found := _differences(book.settings, state):
        raise InvalidRequest(f"the saved dock was created with {'; with '.join(found)}")
    if book.samples or book.groups or book.closed_steps or book.leases or book.reservations:
        raise InvalidRequest("a saved dock can only be restored into one that nothing was put into")
    saved = {(node, offset) for node, offset, _ in state["extents"]}
    needed = {(node, offset) for node, offset, *_ in state["blocks"]}
    given = [(node, offset) for node, offset, _, _ in moved]
    if len(set(given)) != len(given) or not needed <= set(given) <= saved:
        raise InvalidRequest("each extent of the saved dock that holds payload needs one new place")


def _differences(settings: Settings, state: Mapping[str, Any]) -> list[str]:
    """What a saved dock was created with that this one was not."""
    dtypes, consumers, samples_per_group = state["settings"]
    own = {name: list(columns) for name, columns in settings.consumers.items()}
    found = []
    if dtypes != settings.dtypes:
        found.append(f"columns {dtypes}, here {dict(settings.dtypes)}")
    if {name: sorted(columns) for name, columns in consumers.items()} != {name: sorted(own[name]) for name in own}:
        found.append(f"consumers {consumers}, here {own}")
    if samples_per_group != settings.samples_per_group:
        found.append(f"samples_per_group={samples_per_group}, here {settings.samples_per_group}")
    return found
