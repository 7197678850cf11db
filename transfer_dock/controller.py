"""The Ray actor around the ledger: it waits, watches deadlines, and answers with data. Payload never comes here."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer_dock.columns import ColumnRead, ColumnWrite
from transfer_dock.errors import DockError, DockTimeout, InvalidRequest
from transfer_dock.explain import explain_get, explain_put
from transfer_dock.keys import pack_keys, unpack_keys
from transfer_dock.ledger import Ledger
from transfer_dock.waiting import WaitingLine


@dataclass(frozen=True)
class Reservation:
    """Leave to write the named columns of a put."""

    ticket: int
    columns: list[str]


@dataclass(frozen=True)
class Grant:
    """A lease on samples (keys as packed), with the places of their columns."""

    ticket: int
    packed: np.ndarray
    columns: dict[str, ColumnRead]


def _answers(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Return a DockError instead of raising it: an exception out of an actor arrives wrapped, with its traceback."""

    @functools.wraps(method)
    async def answer(self: Controller, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        try:
            return await method(self, *args, **kwargs)
        except DockError as error:
            return error
        finally:
            self.watch()

    return answer


class Controller:
    """One per dock. All state changes happen between two awaits of one event loop, so each is atomic."""

    def __init__(self, *ledger_args: Any) -> None:
        self.ledger = Ledger(*ledger_args)
        self._gets = {consumer: WaitingLine(in_order=False) for consumer in self.ledger.consumers}
        # A put that adds columns to samples in the dock goes before one that brings new samples: it is what lets
        # consumers go on, and so frees memory.
        self._additions = WaitingLine(in_order=False)
        self._entries = WaitingLine(in_order=True)
        self._timer: asyncio.TimerHandle | None = None

    def settle(self) -> None:
        """End what is past its deadline, and serve who waited for it."""
        self._serve_gets(self.ledger.expire(time.monotonic()))
        self._serve_puts()

    def watch(self) -> None:
        """Wake up when the next lease or reservation ends."""
        deadline = self.ledger.next_deadline()
        if self._timer is not None:
            if self._timer.when() == deadline and not self._timer.cancelled():
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.settle()
        self.watch()

    def _serve_gets(self, consumers: set[str]) -> None:
        for consumer in consumers:
            self._gets[consumer].serve()

    def _serve_puts(self) -> None:
        self._additions.serve()
        self._entries.serve()

    @_answers
    async def reserve(
        self, packed: np.ndarray, writes: Mapping[str, ColumnWrite], timeout: float
    ) -> Reservation | None:
        """Leave to write a put's new columns once there is room for them; None when it brings nothing new."""
        ledger, keys, started = self.ledger, unpack_keys(packed), time.monotonic()
        nbytes = sum(writes[column].nbytes for column in ledger.new_columns(keys, writes))
        if nbytes > ledger.capacity_bytes:
            raise InvalidRequest(
                f"a put of {nbytes} bytes can never fit into capacity_bytes={ledger.capacity_bytes}; "
                "put fewer samples at once or create the dock with more"
            )
        is_entry = any(key not in ledger.samples for key in keys)

        def attempt() -> Reservation | None:
            columns = ledger.new_columns(keys, writes)
            if is_entry and self._additions:
                return None
            ticket = ledger.reserve(sum(writes[column].nbytes for column in columns), time.monotonic())
            return None if ticket is None else Reservation(ticket, columns)

        reservation = await (self._entries if is_entry else self._additions).wait(attempt, timeout)
        self._serve_puts()
        if reservation is None:
            raise DockTimeout(explain_put(ledger, nbytes, time.monotonic() - started))
        if reservation.columns:
            return reservation
        ledger.cancel(reservation.ticket)
        return None

    @_answers
    async def commit(
        self, ticket: int, packed: np.ndarray, writes: Mapping[str, ColumnWrite], refs: Mapping[str, list[Any]]
    ) -> None:
        """Make a put visible. `refs` holds each ObjectRef in a list, or Ray would fetch the payload into this actor."""
        held = {column: refs_of_column[0] for column, refs_of_column in refs.items()}
        self._serve_gets(self.ledger.commit(ticket, unpack_keys(packed), writes, held))
        self._serve_puts()

    @_answers
    async def cancel(self, ticket: int) -> None:
        self.ledger.cancel(ticket)
        self._serve_puts()

    @_answers
    async def lease(
        self, consumer: str, count: int, minimum: int, whole_groups: bool, step: int | None, timeout: float
    ) -> Grant:
        """A lease on `minimum` to `count` ready samples, as soon as there are enough."""
        ledger, started = self.ledger, time.monotonic()
        request = (consumer, count, minimum, whole_groups, step)
        ledger.check_request(*request)
        found = await self._gets[consumer].wait(lambda: ledger.lease(*request, time.monotonic()), timeout)
        if found is None:
            raise DockTimeout(explain_get(ledger, *request, time.monotonic() - started))
        ticket, keys = found
        return Grant(ticket, pack_keys(keys), ledger.read(keys, ledger.consumers[consumer]))

    @_answers
    async def ack(self, consumer: str, ticket: int, packed: np.ndarray) -> None:
        self.ledger.ack(consumer, ticket, unpack_keys(packed))
        self._serve_puts()

    @_answers
    async def release(self, ticket: int, packed: np.ndarray) -> None:
        self._serve_gets(self.ledger.release(ticket, unpack_keys(packed)))

    @_answers
    async def status(self) -> dict[str, Any]:
        waiting = {consumer: len(line) for consumer, line in self._gets.items()}
        return self.ledger.status() | {
            "gets_waiting": waiting,
            "puts_waiting": len(self._additions) + len(self._entries),
        }

    @_answers
    async def close_step(self, step: int, carry_unfinished: bool) -> int:
        dropped = self.ledger.close_step(step, carry_unfinished)
        # Gets that wait for this step fail now instead of at their deadline.
        self._serve_gets(set(self.ledger.consumers))
        self._serve_puts()
        return dropped
