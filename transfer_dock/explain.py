"""What a put or a get was waiting for when its deadline passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer_dock.book import Book
from transfer_dock.choice import fresh_groups
from transfer_dock.columns import ColumnWrite
from transfer_dock.keys import SampleKey, describe_keys
from transfer_dock.ledger import Ledger
from transfer_dock.records import DROPPED, LeaseRequest

# Processes named as producers of a column, and characters of a node's id.
PRODUCERS_SHOWN = 4
NODE_SHOWN = 8


def explain_get(ledger: Ledger, request: LeaseRequest, seconds: float) -> str:
    """Names the consumer, what is ready, and for each missing column the samples that lack it and who puts it."""
    book, consumer, step = ledger.book, request.consumer, request.step
    samples = {key: sample for key, sample in book.samples.items() if step is None or key.step == step}
    waiting = {key: sample for key, sample in samples.items() if sample.missing[consumer]}
    leased = sum(consumer in sample.leased for sample in samples.values())
    marks = [sample.acked[consumer] for sample in samples.values() if consumer in sample.acked]
    dropped = marks.count(DROPPED)
    ready = len(samples) - len(waiting) - leased - len(marks)
    lines = [
        f"get({consumer!r}) waited {seconds:.1f} s for {_wanted(ledger, request)}",
        f"the dock holds {len(samples)} of them: {ready} ready, {leased} leased, {len(marks) - dropped} acknowledged, "
        + (f"{dropped} dropped as too old, " if dropped else "")
        + f"{len(waiting)} with missing columns",
    ]
    for column in ledger.settings.consumers[consumer]:
        if lacking := [key for key, sample in waiting.items() if column not in sample.digests]:
            text = f"column {column!r} is missing on {len(lacking)} samples ({describe_keys(lacking)})"
            lines.append(f"{text}, {who}" if (who := _producers(book, column)) else text)
    stays = _stays(book, request, samples)
    lines += stays
    if not waiting and not stays and ready < request.minimum * (request.ranks or 1):
        lines.append("no producer has put the others")
    return "; ".join(lines)


def _wanted(ledger: Ledger, request: LeaseRequest) -> str:
    count = f"{request.count}" if request.minimum == request.count else f"{request.minimum} to {request.count}"
    text = f"{count} samples" + ("" if request.step is None else f" of step {request.step}")
    if request.whole_groups:
        text += f" in whole groups of {ledger.settings.samples_per_group}"
    if request.ranks is not None:
        text += f" for each of {request.ranks} ranks"
    return text


def _producers(book: Book, column: str) -> str:
    if column not in book.producers:
        return "nobody has put it yet"
    latest = list(book.producers[column])[::-1]
    if not latest:
        return ""
    shown = ", ".join(f"pid {pid} on node {node[:NODE_SHOWN]}" for node, pid, _ in latest[:PRODUCERS_SHOWN])
    more = len(latest) - PRODUCERS_SHOWN
    return f"put so far by {shown}" + (f" and {more} more" if more > 0 else "")


def _stays(book: Book, request: LeaseRequest, samples: Mapping[SampleKey, object]) -> list[str]:
    """Ready samples that this request can't have."""
    pool, lines = book.pools[request.consumer], []
    ready = [key for key in pool.available() if key in samples]
    if (fresh := fresh_groups(book, request.max_staleness)) is not None:
        if old := [key for key in ready if not fresh(key[:2])]:
            lines.append(f"{len(old)} samples older than max_staleness={request.max_staleness} ({describe_keys(old)})")
        ready = [key for key in ready if fresh(key[:2])]
    if request.whole_groups:
        complete = set(pool.complete)
        if broken := [key for key in ready if key[:2] not in complete]:
            lines.append(f"ready samples of incomplete groups: {describe_keys(broken)}")
    return lines


def explain_put(ledger: Ledger, keys: Sequence[SampleKey], writes: Mapping[str, ColumnWrite], seconds: float) -> str:
    """Names the room that was lacking, and for each consumer how many samples it has not acknowledged."""
    book, settings = ledger.book, ledger.settings
    held = [sample.digests if (sample := book.samples.get(key)) else {} for key in keys]
    new = [write for column, write in writes.items() if any(column not in digests for digests in held)]
    nbytes, total = sum(write.nbytes for write in new), len(book.samples)
    finished = {name: book.acked_counts[name] + book.dropped_counts[name] for name in settings.consumers}
    behind = [
        f"{consumer!r} has not acknowledged {total - count} of {total} samples"
        for consumer, count in finished.items()
        if count < total
    ]
    in_use = f"{book.memory.bytes_held} bytes held and {book.bytes_reserved} being written"
    room, again = f"{nbytes} bytes ({in_use}, of {settings.capacity_bytes})", "memory is free again when every"
    lacks = ledger.lacks_room(keys, nbytes)
    if lacks == "groups":
        opened = f"{len(book.open_groups)} open of {settings.capacity_groups}"
        room, again = f"{ledger.groups_to_open(keys)} groups ({opened})", "a group is closed when every"
    elif lacks is None:
        behind.append("other puts wait before this one, or no free memory of its node is in one piece")
    return (
        f"put waited {seconds:.1f} s for room for {room}; {again} consumer acknowledged "
        f"{'its samples' if lacks == 'groups' else 'a sample'} or its step is closed; "
        f"{'; '.join(behind) or 'other puts wait before this one'}"
    )
