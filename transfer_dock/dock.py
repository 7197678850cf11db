"""The handle that stages hold: it moves payload through Ray's object store and metadata through the controller."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from transfer_dock.batch import Batch, LazyColumns, Lease
from transfer_dock.columns import check_dtypes, encode
from transfer_dock.controller import Controller, Grant
from transfer_dock.errors import (
    DockClosed,
    DockError,
    DockTimeout,
    InvalidRequest,
    UnknownColumn,
    unknown_name,
)
from transfer_dock.keys import SampleKey, pack_keys, unpack_keys
from transfer_dock.ledger import Ledger

# What a call may take beyond the wait it asked for, before the controller counts as unreachable; seconds.
REPLY_GRACE = 30.0
# Requests that may wait in the controller at once (Ray's default is 1000).
MOST_REQUESTS = 10_000


class TransferDock:
    """A handle on one dock; small, and can be sent to any actor or task of the same Ray cluster."""

    def __init__(self, controller: Any, dtypes: Mapping[str, str], timeout: float) -> None:
        self._controller, self._dtypes, self._timeout = controller, dict(dtypes), timeout

    @classmethod
    def create(
        cls,
        *,
        columns: Mapping[str, str],
        consumers: Mapping[str, Sequence[str]],
        samples_per_group: int,
        capacity_bytes: int,
        timeout: float = 120.0,
        lease_timeout: float = 600.0,
    ) -> TransferDock:
        """Start a dock on the running Ray cluster.

        Args: columns: dtype by name: a numpy number type, "str" or "object" (the latter two travel by msgpack);
        consumers: the columns that each reads; samples_per_group: samples of a complete group; capacity_bytes: payload
        that may wait in the dock; timeout: seconds that a call waits by default; lease_timeout: seconds until the
        samples of an unacknowledged get are handed out again.
        Raises: UnknownColumn, InvalidRequest, DockError when Ray is not initialised.
        """
        if not ray.is_initialized():
            raise DockError("TransferDock.create needs a running Ray: call ray.init() first")
        check_dtypes(columns)
        sizes = {
            "samples_per_group": samples_per_group,
            "capacity_bytes": capacity_bytes,
            "timeout": timeout,
            "lease_timeout": lease_timeout,
        }
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value <= 0]:
            raise InvalidRequest(f"must be positive: {', '.join(wrong)}")
        arguments = (dict(columns), dict(consumers), samples_per_group, capacity_bytes, lease_timeout)
        Ledger(*arguments)  # fails here, with the real error, rather than in the actor's constructor
        actor = ray.remote(num_cpus=0, max_concurrency=MOST_REQUESTS, max_restarts=0)(Controller)
        dock = cls(actor.remote(*arguments), columns, timeout)
        dock.status()
        return dock

    def put(self, columns: Mapping[str, Any], keys: Sequence[SampleKey], timeout: float | None = None) -> None:
        """Store one or more columns of samples. Repeating an equal put changes nothing.

        Args: columns: name -> Jagged (rows of different lengths), ndarray or tensor [S, ...], list of strings or
        objects, or list of numbers or rows; keys: the S samples, in row order; timeout: seconds to wait for room.
        Raises: UnknownColumn, ColumnMismatch, ConflictingPut, StepClosed, InvalidRequest, DockTimeout, DockClosed.
        """
        deadline = time.monotonic() + self._limit(timeout)
        if not keys or not columns:
            return
        encoded = {}
        for name, values in columns.items():
            if name not in self._dtypes:
                raise UnknownColumn(unknown_name("column", name, self._dtypes))
            encoded[name] = encode(name, self._dtypes[name], values, len(keys))
        writes = {name: write for name, (write, _) in encoded.items()}
        remaining = max(deadline - time.monotonic(), 0.0)
        packed = pack_keys(keys)
        reservation = self._call("reserve", packed, writes, remaining, wait=remaining)
        if reservation is None:
            return
        try:
            refs = {name: [ray.put(encoded[name][1])] for name in reservation.columns}
            self._call("commit", reservation.ticket, packed, writes, refs)
        except DockClosed:
            raise
        except BaseException:
            self._call("cancel", reservation.ticket)
            raise

    def get(
        self,
        consumer: str,
        count: int,
        *,
        minimum: int | None = None,
        whole_groups: bool = False,
        step: int | None = None,
        timeout: float | None = None,
    ) -> Batch:
        """Lease the lowest `count` samples that have all columns of `consumer` and that it has not had yet.

        Args: minimum: be content with this many (default: exactly `count`); whole_groups: hand out complete groups
        only (`count` and `minimum` are multiples of samples_per_group); step: of this step only; timeout: seconds.
        Raises: DockTimeout naming what is missing, UnknownConsumer, InvalidRequest, StepClosed, DockClosed.
        """
        limit = self._limit(timeout)
        minimum = count if minimum is None else minimum
        grant: Grant = self._call("lease", consumer, count, minimum, whole_groups, step, limit, wait=limit)
        columns = LazyColumns(grant.columns, self._timeout)
        return Batch(unpack_keys(grant.packed), Lease(grant.ticket, consumer), columns)

    def ack(self, batch: Batch) -> None:
        """These samples are consumed for good. In a whole-groups lease a group counts when all of it is acknowledged.

        Raises: LeaseLost when the dock took a sample back before; then none of the batch is acknowledged.
        """
        self._call("ack", batch.lease.consumer, batch.lease.number, pack_keys(batch.keys))

    def release(self, batch: Batch) -> None:
        """Hand samples back unconsumed; nothing happens for those that the lease does not hold any more."""
        self._call("release", batch.lease.number, pack_keys(batch.keys))

    def status(self) -> dict[str, Any]:
        """Counts over the samples held: samples, columns {name: samples}, groups_complete {column: groups},
        consumers {name: {ready, leased, acked}}, bytes_held, bytes_reserved, capacity_bytes, gets_waiting {consumer:
        calls}, puts_waiting."""
        return self._call("status")

    def close_step(self, step: int, carry_unfinished: bool = False) -> int:
        """Drop the samples of a step and free their payload; leases on them are lost. Returns how many were dropped.

        With `carry_unfinished` only samples that every consumer acknowledged are dropped; the others stay as they are,
        and their groups may still be completed. Without it nothing can be put into the step any more.
        """
        return self._call("close_step", step, carry_unfinished)

    def close(self) -> None:
        """Kill the controller: who still waits gets DockClosed, and the payload is freed."""
        ray.kill(self._controller, no_restart=True)

    def _limit(self, timeout: float | None) -> float:
        return self._timeout if timeout is None else timeout

    def _call(self, method: str, *args: Any, wait: float = 0.0) -> Any:
        try:
            reply = ray.get(getattr(self._controller, method).remote(*args), timeout=wait + REPLY_GRACE)
        except GetTimeoutError:
            raise DockTimeout(f"the dock's controller did not answer {method} in {wait + REPLY_GRACE:.0f} s") from None
        except RayActorError as error:
            raise DockClosed(f"{method} found the dock's controller gone: {str(error).splitlines()[0]}") from None
        if isinstance(reply, DockError):
            raise reply
        return reply
