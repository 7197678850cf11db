"""What a put or a get was waiting for when its deadline passed."""

from __future__ import annotations

from transfer_dock.keys import describe_keys
from transfer_dock.ledger import Ledger


def explain_get(
    ledger: Ledger, consumer: str, count: int, minimum: int, whole_groups: bool, step: int | None, seconds: float
) -> str:
    """Names the consumer, what is ready, and for each missing column how many samples, and which, lack it."""
    samples = {key: sample for key, sample in ledger.samples.items() if step is None or key.step == step}
    waiting = {key: sample for key, sample in samples.items() if sample.missing[consumer]}
    leased = sum(consumer in sample.leased for sample in samples.values())
    acked = sum(consumer in sample.acked for sample in samples.values())
    ready = len(samples) - len(waiting) - leased - acked
    wanted = f"{count}" if minimum == count else f"{minimum} to {count}"
    scope = "" if step is None else f" of step {step}"
    lines = [
        f"get({consumer!r}) waited {seconds:.1f} s for {wanted} samples{scope}"
        + (f" in whole groups of {ledger.samples_per_group}" if whole_groups else ""),
        f"the dock holds {len(samples)} of them: {ready} ready, {leased} leased, {acked} acknowledged, "
        f"{len(waiting)} with missing columns",
    ]
    for column in ledger.consumers[consumer]:
        if lacking := [key for key, sample in waiting.items() if column not in sample.digests]:
            lines.append(f"column {column!r} is missing on {len(lacking)} samples ({describe_keys(lacking)})")
    if whole_groups:
        complete = set(ledger.pools[consumer].groups)
        broken = [key for key in ledger.pools[consumer].keys if key in samples and key[:2] not in complete]
        if broken:
            lines.append(f"ready samples of incomplete groups: {describe_keys(broken)}")
    if not waiting and ready < minimum:
        lines.append("no producer has put the others")
    return "; ".join(lines)


def explain_put(ledger: Ledger, nbytes: int, seconds: float) -> str:
    """Names the bytes, and for each consumer how many samples it has not acknowledged."""
    total = len(ledger.samples)
    behind = [
        f"{consumer!r} has not acknowledged {total - ledger.acked_counts[consumer]} of {total} samples"
        for consumer in ledger.consumers
        if ledger.acked_counts[consumer] < total
    ]
    held = f"{ledger.bytes_held} bytes held and {ledger.bytes_reserved} being written, of {ledger.capacity_bytes}"
    return (
        f"put waited {seconds:.1f} s for room for {nbytes} bytes ({held}); memory is free again when every consumer "
        f"acknowledged a sample or its step is closed; {'; '.join(behind) or 'other puts wait before this one'}"
    )
