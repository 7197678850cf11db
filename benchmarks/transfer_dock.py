"""How fast is the TransferDock? `python -m benchmarks.transfer_dock` measures it beside Ray and TransferQueue.

Round trips: one process puts jagged RL columns, another gets them and sums every byte; the sums are checked. The clock
is the driver's, around the two actor calls (whose overhead is the same for all); freeing afterwards is not timed. Each
peer has untimed trips before, then they take turns; GB/s is the payload over the median time. `copies_*` are the dock's
own count of bytes copied for each byte put and got. Ray is judged by the same tensors; `ray_numpy`, its fastest way (a
program that turns its tensors into arrays and back), is for information; see `peers`.

Metadata: samples are put, leased and acknowledged, 128 (16 groups of 8) in a call, by as many tasks as there are
simulated consumers, in 4 processes (the tasks share up to 4 consumer names). A put, lease or acknowledgement of a
sample is a transition.

Bars: 4x Ray and 4x TransferQueue at 300 MB, 3x TransferQueue at 2 GB, 20,000 sample-transitions/s. Exits 1 below one.
`--quick`: one small case of each, not judged. The whole needs 24 GiB of memory.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import ray

from benchmarks.peers import COLUMNS, SAMPLES_PER_GROUP, Stage
from transfer_dock import SampleKey, TransferDock


class Case(NamedTuple):
    """A size of round trip: its bytes, how often it is timed, and the least ratios to the peers."""

    nbytes: int
    repeats: int
    bars: dict[str, float]


CASES = {
    "30MB": Case(30_000_000, 5, {}),
    "300MB": Case(300_000_000, 5, {"ray": 4.0, "transferqueue": 4.0}),
    "2GB": Case(2_000_000_000, 3, {"transferqueue": 3.0}),
}
PEERS = ("ours", "ray", "transferqueue", "ray_numpy")
# Ray's store is slow until it has touched its memory.
WARM_UP = 2
CONSUMERS = (1, 16, 256)
LEAST_TRANSITIONS = 20_000.0
NAMES, CLIENTS, BATCH, SAMPLES = 4, 4, 128, 65536


@contextmanager
def running_ray(object_store_memory: int) -> Iterator[None]:
    """A Ray of our own, ended with all its processes. It claims CPUs for TransferQueue, whose actors reserve some."""
    ray.init(
        address="local",
        num_cpus=16,
        object_store_memory=object_store_memory,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def running_dock(**options: Any) -> Iterator[TransferDock]:
    dock = TransferDock.create(samples_per_group=SAMPLES_PER_GROUP, **options)
    try:
        yield dock
    finally:
        dock.close()


def round_trip(producer: Any, reader: Any, peer: str, trip: int, sums: dict[str, int]) -> float:
    """Seconds from before the put to when the reader has the sum of every column."""
    begin = time.perf_counter()
    handle = ray.get(producer.put.remote(peer, trip))
    found = ray.get(reader.read.remote(peer, handle))
    seconds = time.perf_counter() - begin
    if found != sums:
        raise RuntimeError(f"{peer} did not hand over what was put: sums {found}, expected {sums}")
    ray.get(reader.end.remote(peer, handle))
    return seconds


def copies(producer: Any, reader: Any) -> str:
    """Bytes that the dock copied for each byte put, and for each byte got, in all trips so far."""
    put, copied_put, _, _ = ray.get(producer.copied.remote())
    _, _, got, copied_got = ray.get(reader.copied.remote())
    return f"copies_put={copied_put / put:.2f} copies_get={copied_got / got:.2f}"


def compare(name: str, case: Case, producer: Any, reader: Any) -> list[str]:
    """Time one case, print its row; what is below its bars."""
    options = {"columns": COLUMNS, "consumers": {"reader": list(COLUMNS)}, "capacity_bytes": case.nbytes}
    with running_dock(**options) as dock:
        ray.get([stage.attach.remote(dock) for stage in (producer, reader)])
        nbytes, sums = ray.get(producer.load.remote(case.nbytes))
        seconds: dict[str, list[float]] = {peer: [] for peer in PEERS}
        for trip in range(WARM_UP + case.repeats):
            turn = trip % len(PEERS)
            for peer in PEERS[turn:] + PEERS[:turn]:
                seconds[peer].append(round_trip(producer, reader, peer, trip, sums))
        speed = {peer: nbytes / 1e9 / statistics.median(times[WARM_UP:]) for peer, times in seconds.items()}
        ratios = {peer: speed["ours"] / speed[peer] for peer in PEERS[1:]}
        rates = " ".join(f"{peer}_GBps={speed[peer]:.2f}" for peer in PEERS[1:])
        ratio = " ".join(f"{peer}_ratio={value:.2f}" for peer, value in ratios.items())
        print(f"case={name} ours_GBps={speed['ours']:.2f} {ratio} {rates} {copies(producer, reader)}", flush=True)
    missed = [(peer, bar) for peer, bar in case.bars.items() if ratios[peer] < bar]
    return [f"{name} {peer}_ratio: {ratios[peer]:.2f} < {bar:g}" for peer, bar in missed]


class Client:
    """A process with many simulated consumers."""

    def __init__(self, dock: TransferDock) -> None:
        self.dock = dock

    async def put(self, step: int, first: int, last: int) -> int:
        """Put the samples first..last, in batches. Returns the number of calls."""
        for low in range(first, last, BATCH):
            keys = [SampleKey(step, *divmod(index, SAMPLES_PER_GROUP)) for index in range(low, low + BATCH)]
            await self.dock.aput({"rewards": np.zeros(BATCH, np.float32)}, keys)
        return (last - first) // BATCH

    async def consume(self, step: int, shares: list[tuple[str, int]]) -> int:
        """One task for each (consumer, batches): it leases and acknowledges that many. Returns the number of calls."""

        async def task(consumer: str, batches: int) -> None:
            for _ in range(batches):
                await self.dock.aack(await self.dock.aget(consumer, BATCH, step=step))

        await asyncio.gather(*(task(*share) for share in shares))
        return 2 * sum(batches for _, batches in shares)


def metadata(consumers: int, samples: int, repeats: int) -> list[str]:
    """Time puts, leases and acknowledgements at the controller, print the row; what is below the bar."""
    names = [f"consumer_{index}" for index in range(min(consumers, NAMES))]
    # Tasks of one name stand together here, and are dealt out to the processes.
    batches = samples * len(names) // BATCH // consumers
    shares = [(names[task * len(names) // consumers], batches) for task in range(consumers)]
    columns = {"columns": {"rewards": "float32"}, "consumers": {name: ["rewards"] for name in names}}
    with running_dock(capacity_bytes=1 << 26, **columns) as dock:
        clients = [ray.remote(num_cpus=0)(Client).remote(dock) for _ in range(CLIENTS)]
        part, seconds = samples // CLIENTS, []
        for step in range(repeats + 1):
            begin = time.perf_counter()
            puts = [client.put.remote(step, rank * part, (rank + 1) * part) for rank, client in enumerate(clients)]
            calls = sum(ray.get(puts))
            gets = [client.consume.remote(step, shares[rank::CLIENTS]) for rank, client in enumerate(clients)]
            calls += sum(ray.get(gets))
            seconds.append(time.perf_counter() - begin)
            dock.close_step(step, carry_unfinished=False)
        for client in clients:
            ray.kill(client)
    median = statistics.median(seconds[1:])
    rate = samples * (1 + 2 * len(names)) / median
    row = f"calls_per_s={calls / median:.0f} sample_transitions_per_s={rate:.0f}"
    print(f"case=metadata consumers={consumers} {row}", flush=True)
    if rate >= LEAST_TRANSITIONS:
        return []
    return [f"metadata consumers={consumers} sample_transitions_per_s: {rate:.0f} < {LEAST_TRANSITIONS:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases only, not judged against the bars")
    quick = parser.parse_args().quick
    cases = {"30MB": CASES["30MB"]} if quick else CASES
    below: list[str] = []
    with running_ray(object_store_memory=3 * max(case.nbytes for case in cases.values())):
        # One after the other: the first starts TransferQueue, the second connects to it.
        producer = ray.remote(num_cpus=0)(Stage).remote()
        ray.get(producer.__ray_ready__.remote())
        reader = ray.remote(num_cpus=0)(Stage).remote()
        for name, case in cases.items():
            below += compare(name, case, producer, reader)
    with running_ray(object_store_memory=1 << 27):
        for consumers in CONSUMERS:
            below += metadata(consumers, SAMPLES // 8 if quick else SAMPLES, repeats=1 if quick else 3)
    if quick:
        return 0
    print("\n".join(f"FAIL {line}" for line in below) if below else "PASS")
    return 1 if below else 0


if __name__ == "__main__":
    sys.exit(main())
