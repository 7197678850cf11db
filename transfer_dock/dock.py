"""The handle that stages hold: it moves payload through shared memory and metadata through the controller."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_dock.access import Access, adopt
from transfer_dock.arena import Arena, Pin, sweep
from transfer_dock.batch import Batch, LazyColumns, Lease
from transfer_dock.calls import Call, Caller, Steps, Work, ask
from transfer_dock.checkpoint import load, save
from transfer_dock.columns import ColumnRead, Encoded, encode, lay_out
from transfer_dock.controller import DIGESTS_WANTED, Controller
from transfer_dock.errors import DockError, DockTimeout, InvalidRequest, UnknownColumn, unknown_name
from transfer_dock.jagged import Jagged, as_tensor
from transfer_dock.keys import SampleKey, pack_keys, unpack_keys
from transfer_dock.nodes import Home, new_arena_path
from transfer_dock.records import Settings
from transfer_dock.spaces import Spaces

# Requests that may wait in the controller at once (Ray's default is 1000).
MOST_REQUESTS = 10_000

# How long the controller may take to remove the dock's files; seconds.
CLOSE_GRACE = 5.0

# From here on a put hashes beside the copy, in a thread: both are bound by memory, and neither needs the interpreter.
PARALLEL_BYTES = 4 << 20


class TransferDock:
    """A handle on one dock; small, and can be sent to any actor or task of the same Ray cluster."""

    def __init__(self, access: Access, settings: Settings, timeout: float) -> None:
        self._access, self._caller, self._settings, self._timeout = access, access.caller, settings, timeout

    @classmethod
    def create(
        cls,
        *,
        columns: Mapping[str, str],
        consumers: Mapping[str, Sequence[str]],
        samples_per_group: int,
        capacity_bytes: int,
        capacity_groups: int | None = None,
        timeout: float = 120.0,
        lease_timeout: float = 600.0,
        token_columns: Sequence[str] = (),
        restore: str | None = None,
    ) -> TransferDock:
        """Start a dock on the running Ray cluster.

        Args: columns: dtype by name: a numpy number type, "str" or "object" (the latter two travel by msgpack);
        consumers: the columns that each reads; samples_per_group: samples of a complete group; capacity_bytes: payload
        that may wait in the dock; capacity_groups: groups that may be unfinished at once; timeout: seconds that a call
        waits by default; lease_timeout: seconds until the samples of an unacknowledged get are handed out again;
        token_columns: whose lengths `balance_tokens` adds up (default: all variable-length number columns that the
        consumer reads); restore: a file that `save` wrote.
        Raises: UnknownColumn, InvalidRequest, DockError when Ray is not initialised or `restore` can't be read.
        """
        if not ray.is_initialized():
            raise DockError("TransferDock.create needs a running Ray: call ray.init() first")
        reads = {name: tuple(dict.fromkeys(read)) for name, read in consumers.items()}
        settings = Settings(
            dict(columns),
            reads,
            samples_per_group,
            capacity_bytes,
            lease_timeout,
            capacity_groups,
            tuple(token_columns),
        )
        if timeout <= 0:
            raise InvalidRequest(f"must be positive: timeout={timeout}")
        # The process is in the name, so that who finds the files in shared memory can tell whose they are.
        name, node = f"{os.getpid()}-{uuid.uuid4().hex[:12]}", ray.get_runtime_context().get_node_id()
        home = Home(name, node, new_arena_path(name, node, capacity_bytes))
        sweep(os.path.dirname(home.path))
        adopt(home.path, Arena.create(home.path, Spaces(capacity_bytes).size))
        options = {
            "num_cpus": 0,
            "max_concurrency": MOST_REQUESTS,
            "max_restarts": -1,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
        }
        actor = ray.remote(Controller).options(**options).remote(list(home), settings.as_data())
        dock = cls(Access(Caller(actor), home), settings, timeout)
        dock.status()
        if restore is not None:
            load(restore, dock._access, settings)
        return dock

    def __enter__(self) -> TransferDock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def put(self, columns: Mapping[str, Any], keys: Sequence[SampleKey], timeout: float | None = None) -> None:
        """Store one or more columns of samples. Repeating an equal put changes nothing.

        Args: columns: name -> Jagged (rows of different lengths), ndarray or tensor [S, ...], list of strings or
        objects, or list of numbers or rows; keys: the S samples, in row order; timeout: seconds to wait for room.
        Raises: UnknownColumn, ColumnMismatch, ConflictingPut, StepClosed, InvalidRequest, DockTimeout, DockClosed.
        """
        self._caller.run(self._put(columns, keys, self._deadline(timeout)))

    async def aput(self, columns: Mapping[str, Any], keys: Sequence[SampleKey], timeout: float | None = None) -> None:
        """`put` for callers in an event loop."""
        await self._caller.arun(self._put(columns, keys, self._deadline(timeout)))

    def get(
        self,
        consumer: str,
        count: int,
        *,
        minimum: int | None = None,
        whole_groups: bool = False,
        step: int | None = None,
        balance_tokens: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
        max_staleness: int | None = None,
        stale: str = "wait",
        timeout: float | None = None,
    ) -> Batch:
        """Lease the lowest `count` samples that have all columns of `consumer` and that it has not had yet.

        Args: minimum: be content with this many (default: exactly `count`); whole_groups: hand out complete groups
        only (`count` and `minimum` are multiples of samples_per_group); step: of this step only; balance_tokens: deal
        ranks * count samples to `ranks` callers, `count` each with similar sums of tokens, and take the share of `rank`
        (without them: as many shares as are ready, and any of them); max_staleness: closed steps that a sample may have
        been carried over; stale: what becomes of older ones: "wait" leaves them, "drop" finishes them for this
        consumer; timeout: seconds.
        Raises: DockTimeout naming what is missing, UnknownConsumer, InvalidRequest, StepClosed, DockClosed.
        """
        request = self._request(
            consumer, count, minimum, whole_groups, step, balance_tokens, rank, ranks, max_staleness, stale
        )
        return self._caller.run(self._get(request, self._deadline(timeout)))

    async def aget(
        self,
        consumer: str,
        count: int,
        *,
        minimum: int | None = None,
        whole_groups: bool = False,
        step: int | None = None,
        balance_tokens: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
        max_staleness: int | None = None,
        stale: str = "wait",
        timeout: float | None = None,
    ) -> Batch:
        """`get` for callers in an event loop; a cancelled one takes nothing."""
        request = self._request(
            consumer, count, minimum, whole_groups, step, balance_tokens, rank, ranks, max_staleness, stale
        )
        return await self._caller.arun(self._get(request, self._deadline(timeout)))

    def ack(self, batch: Batch) -> None:
        """These samples are consumed for good. In a whole-groups lease a group counts when all of it is acknowledged.

        Raises: LeaseLost when the dock took a sample back before; then none of the batch is acknowledged.
        """
        self._caller.run(ask("ack", batch.lease.consumer, batch.lease.number, pack_keys(batch.keys)))

    async def aack(self, batch: Batch) -> None:
        """`ack` for callers in an event loop."""
        await self._caller.arun(ask("ack", batch.lease.consumer, batch.lease.number, pack_keys(batch.keys)))

    def release(self, batch: Batch) -> None:
        """Hand samples back unconsumed; nothing happens for those that the lease does not hold any more."""
        self._caller.run(ask("release", batch.lease.number, pack_keys(batch.keys)))

    def status(self) -> dict[str, Any]:
        """Counts over the samples held: samples, columns {name: samples}, groups_complete {column: groups},
        groups_open, ages {closed steps survived: groups}, consumers {name: {ready, leased, acked, dropped}},
        bytes_held, bytes_reserved, capacity_bytes, capacity_groups, nodes {node: {used, highest}} (bytes of its arena),
        gets_waiting {consumer: calls}, puts_waiting."""
        return self._caller.run(ask("status"))

    def close_step(self, step: int, carry_unfinished: bool = True) -> int:
        """Drop the samples of a step that every consumer finished; the others stay as they are, one step older, and
        their groups may still be completed. Returns how many were dropped.

        With `carry_unfinished=False` all of the step's samples are dropped and their payload is freed; leases on them
        are lost, and nothing can be put into the step any more.
        """
        return self._caller.run(ask("close_step", step, carry_unfinished, os.urandom(8)))

    def save(self, path: str) -> int:
        """Write the dock to a file: what every consumer finished, and all samples that are still needed, with payload.

        The file appears whole or not at all. A lease does not survive: its samples will be ready again in a dock
        created with `restore=path`. Returns the bytes written. Raises: OSError, DockError.
        """
        return save(path, self._access, self._timeout)

    def close(self) -> None:
        """End the dock: who still waits gets DockClosed, its memory is freed. Views that are alive stay good."""
        # A controller that is gone already, as after Ctrl-C, leaves the files of other nodes; the next dock that is
        # created there sweeps them up.
        with contextlib.suppress(DockError):
            self._caller.run(ask("close", grace=CLOSE_GRACE))
        ray.kill(self._caller.controller, no_restart=True)
        self._access.forget()
        self._access.home.remove()

    # ---- the calls of MindSpeed-RL's transfer dock, for code that moves from there -----------------------------

    def put_experience(self, data_dict: Mapping[str, Any], indexes: Sequence[SampleKey]) -> None:
        """`put` under the name and arguments of MindSpeed-RL. Samples are named by keys instead of row numbers, and a
        value that was put can't be overwritten by another one."""
        self.put(data_dict, indexes)

    def get_experience(
        self,
        consumer: str,
        experience_columns: Sequence[str],
        experience_count: int,
        get_n_samples: bool = True,
        use_batch_seqlen_balance: bool = False,
    ) -> tuple[dict[str, list[Any]], list[SampleKey]] | tuple[None, None]:
        """Take and acknowledge samples at once, as MindSpeed-RL does: rows by column (tensors without padding, strings,
        objects) and their keys, or (None, None) when there are too few now. What the caller loses then is lost."""
        try:
            batch = self.get(
                consumer,
                experience_count,
                whole_groups=get_n_samples,
                balance_tokens=use_batch_seqlen_balance,
                timeout=0.0,
            )
        except DockTimeout:
            return None, None
        rows = {name: _rows(batch.columns[name]) for name in experience_columns}
        self.ack(batch)
        return rows, list(batch.keys)

    def all_consumed(self, consumer: str) -> bool:
        """Whether the dock holds samples and this consumer is done with all of them."""
        status = self.status()
        counts = status["consumers"][consumer]
        return 0 < status["samples"] == counts["acked"] + counts["dropped"]

    def clear(self) -> None:
        """Close every step that has samples in the dock."""
        self._caller.run(ask("clear"))

    # ---- payload bytes -----------------------------------------------------------------------------------------

    @property
    def bytes_put(self) -> int:
        """Payload bytes that this process has put."""
        return self._access.traffic.put

    @property
    def bytes_copied_put(self) -> int:
        """Bytes that were copied for them: each once, more where rows were no contiguous arrays of the caller."""
        return self._access.traffic.copied_put

    @property
    def bytes_got(self) -> int:
        """Payload bytes of the columns that this process has looked at."""
        return self._access.traffic.got

    @property
    def bytes_copied_get(self) -> int:
        """Bytes that were copied for them: none where a batch's rows lie together in this node's memory."""
        return self._access.traffic.copied_get

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self._timeout if timeout is None else timeout)

    def _put(self, columns: Mapping[str, Any], keys: Sequence[SampleKey], deadline: float) -> Steps[None]:
        if not keys or not columns:
            return
        dtypes = self._settings.dtypes
        for name in columns:
            if name not in dtypes:
                raise UnknownColumn(unknown_name("column", name, dtypes))
        encoded = yield Work(
            lambda: {name: encode(name, dtypes[name], values, len(keys)) for name, values in columns.items()}
        )
        packed, request_id = pack_keys(keys), os.urandom(8)
        writes = {name: column.write.as_data() for name, column in encoded.items()}
        access, started = self._access, time.monotonic()
        try:
            process = (access.node, access.holder, request_id)
            granted = yield Call("reserve", (packed, writes, *process), deadline)
            if granted == DIGESTS_WANTED:
                writes = yield Work(partial(_hashed, encoded))
                granted = yield Call("reserve", (packed, writes, *process), deadline)
            if granted is None:
                return
            waited, (ticket, *place) = granted
            # The dock keeps this memory at least until then: it granted it no sooner than this after the request.
            valid_until = started + waited + self._settings.lease_timeout
            while (written := (yield Work(partial(self._write, encoded, place, valid_until)))) is None:
                _, *place = yield Call("move", (ticket,), deadline)
            yield Call("commit", (ticket, packed, written))
        except BaseException:
            self._caller.tell("withdraw", None, request_id)
            raise

    def _write(
        self, encoded: Mapping[str, Encoded], place: Sequence[Any], valid_until: float
    ) -> dict[str, list[Any]] | None:
        """The columns' metadata with digests; None when the memory is busy."""
        columns, _, extent, size = place
        offsets, _ = lay_out({name: column.write for name, column in encoded.items()}, columns)
        pieces = []
        for name in columns:
            offset = extent + offsets[name]
            for piece in encoded[name].pieces:
                pieces.append((offset, piece))
                offset += piece.nbytes
        nbytes = sum(piece.nbytes for _, piece in pieces)
        write = partial(self._access.arena().write, extent, size, pieces, valid_until)
        if nbytes < PARALLEL_BYTES:
            written, hashed = write(), _hashed(encoded)
        else:
            with ThreadPoolExecutor(1) as beside:
                writing = beside.submit(write)
                hashed = _hashed(encoded)
                written = writing.result()
        if not written:
            return None
        traffic = self._access.traffic
        traffic.put += nbytes
        traffic.copied_put += nbytes + sum(encoded[name].copied for name in columns)
        return hashed

    def _request(self, consumer: str, count: int, minimum: int | None, *rest: Any) -> dict[str, Any]:
        names = ("whole_groups", "step", "balance", "rank", "ranks", "max_staleness", "stale")
        minimum = count if minimum is None else minimum
        return {"consumer": consumer, "count": count, "minimum": minimum, **dict(zip(names, rest, strict=True))}

    def _get(self, request: dict[str, Any], deadline: float) -> Steps[Batch]:
        access, request_id, started = self._access, os.urandom(8), time.monotonic()
        try:
            granted = yield Call("lease", (request | {"request_id": request_id}, access.holder), deadline)
            waited, ticket, packed, ages, columns = granted
            reads = {name: ColumnRead.from_data(data) for name, data in columns.items()}
            keys, lease = unpack_keys(packed), Lease(ticket, request["consumer"])
            pins: dict[int, Pin] | None = access.pin(reads.values())
            if time.monotonic() > started + waited + self._settings.lease_timeout:
                pins = None  # The lease may be over: whoever looks asks first.
        except (asyncio.CancelledError, KeyboardInterrupt):
            # The dock may have granted it meanwhile, or may do so later.
            self._caller.tell("withdraw", request["consumer"], request_id)
            raise
        return Batch(
            keys, lease, np.array(ages, np.int64), LazyColumns(reads, access, lease, keys, self._timeout, pins)
        )


def _hashed(encoded: Mapping[str, Encoded]) -> dict[str, list[Any]]:
    return {name: column.with_digests().as_data() for name, column in encoded.items()}


def _rows(values: Any) -> list[Any]:
    if isinstance(values, Jagged):
        return [as_tensor(row) for row in values.rows()]
    return values if isinstance(values, list) else list(as_tensor(values))
