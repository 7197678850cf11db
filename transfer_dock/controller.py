"""The Ray actor around the ledger: it waits, watches deadlines and processes, and answers. Payload never comes here."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_dock import calls, wire
from transfer_dock.arena import Arena
from transfer_dock.columns import ColumnWrite
from transfer_dock.errors import DockClosed, DockError, DockTimeout
from transfer_dock.explain import explain_get, explain_put
from transfer_dock.journal import Journal
from transfer_dock.keys import pack_keys, unpack_keys
from transfer_dock.ledger import Grant, LeaseRequest, Ledger, Reservation
from transfer_dock.nodes import Home, Nodes
from transfer_dock.records import Settings
from transfer_dock.waiting import WaitingLine

# The journal is written anew, as one state, when it has grown to this many times what it was then; bytes at least.
JOURNAL_GROWTH = 4
JOURNAL_SMALL = 1 << 20

# Memory of the controller's node that is made ready before it is needed; bytes.
TOUCH_AHEAD = 64 << 20

DIGESTS_WANTED = "digests wanted"

# How long a put waits before it asks again for memory that readers still look at; seconds.
BUSY_RETRY = 0.1


class Controller:
    """One per dock. All state changes happen between two awaits of one event loop, so each is atomic.

    Args: home as a Home's fields; settings as data.
    A controller that finds the dock's journal is a restart: it goes on from there.
    """

    def __init__(self, home: Sequence[str], settings: Sequence[Any]) -> None:
        self.home, self.settings = Home(*home), Settings.from_data(settings)
        is_restart = os.path.exists(self.home.journal)
        attached, state, records = _history(Journal.read(self.home.journal) if is_restart else [])
        self.journal = Journal(self.home.journal)
        # Held open for as long as the dock lives: an arena that nobody has open is swept up.
        self._arena = Arena(self.home.path)
        self._touched = 0
        self._is_closed = False
        self.nodes = Nodes(self.home, self.settings.capacity_bytes, attached)
        self.ledger = Ledger.replay(self.settings, state, records, time.monotonic(), record=self.journal.append)
        self._compacted = self.journal.size
        self._gets = {consumer: WaitingLine(in_order=False) for consumer in self.settings.consumers}
        # A put that adds columns to samples in the dock goes before one that brings new samples: it is what lets
        # consumers go on, and so frees memory.
        self._additions = WaitingLine(in_order=False)
        self._entries = WaitingLine(in_order=True)
        # What was imported lives on: a collection of garbage need not look through it in the middle of a request.
        gc.freeze()
        self._timer: asyncio.TimerHandle | None = None
        self._watched: dict[tuple[Any, ...], asyncio.Task[None]] = {}
        self._withdrawn: set[bytes] = set()
        self._methods: Mapping[str, Callable[..., Any]] = {
            name.removeprefix("do_"): getattr(self, name) for name in dir(self) if name.startswith("do_")
        }

    async def answer(self, method: str, message: bytes, wait: float) -> bytes:
        """Do what a handle asks, waiting at most `wait` seconds; request and reply are msgpack."""
        if self._is_closed:
            return calls.refusal(DockClosed(f"{method} found the dock closed"))
        self._settle()
        try:
            return calls.answer(await self._methods[method](wait, *wire.unpack(message)))
        except DockError as error:
            return calls.refusal(error)
        finally:
            self._serve_puts()
            self._watch_time()
            self._compact()
            self._touch_ahead()

    # ---- time and processes ------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """End what is past its deadline, and serve who waited for it."""
        if not self._watched:
            for holder in self.ledger.holders():
                self._watch_holder(holder)
        self._serve(self.ledger.expire(time.monotonic()))

    def _watch_time(self) -> None:
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
        self._settle()
        self._watch_time()

    def _watch_holder(self, holder: Sequence[Any]) -> None:
        """Give back what a process holds as soon as it has ended."""
        name = tuple(holder)
        if name in self._watched:
            return

        async def watch() -> None:
            await self.nodes.process_end(*name)
            del self._watched[name]
            self._serve(self.ledger.end_holder(list(name), time.monotonic()))
            self._watch_time()

        self._watched[name] = asyncio.get_running_loop().create_task(watch())

    def _serve(self, consumers: set[str]) -> None:
        for consumer in consumers:
            self._gets[consumer].serve()
        self._serve_puts()

    def _serve_puts(self) -> None:
        self._additions.serve()
        self._entries.serve()

    def _compact(self) -> None:
        if self.journal.size > max(JOURNAL_SMALL, JOURNAL_GROWTH * self._compacted):
            attached = [("attach", [node, path]) for node, path in self.nodes.paths.items()]
            self.journal.rewrite([*attached, ("state", [self.ledger.book.state()])])
            self._compacted = self.journal.size

    def _touch_ahead(self) -> None:
        """Have memory behind the highest used byte made ready: to touch a page first costs more than to fill it."""
        ahead = min(TOUCH_AHEAD, self.settings.capacity_bytes)
        highest = self.ledger.book.memory.highest.get(self.home.node, 0)
        start = max(self._touched, highest)
        if highest + ahead // 2 >= self._touched and start + ahead <= self._arena.size:
            self._touched = start + ahead
            asyncio.get_running_loop().run_in_executor(None, self._arena.prefault, start, ahead)

    # ---- what handles ask --------------------------------------------------------------------------------------

    async def do_attach(self, wait: float, node: str) -> list[str]:
        """The arena file of a node and the name of the agent there."""
        is_new = node not in self.nodes.paths
        path = await self.nodes.start(node)
        if is_new:
            self.journal.append("attach", [node, path])
        return [path, self.nodes.agent_name(node)]

    async def do_reserve(
        self, wait: float, packed: np.ndarray, data: Mapping[str, Any], node: str, holder: list[Any], request_id: bytes
    ) -> list[Any] | str | None:
        """Leave to write a put's new columns once there is room for them; None when it brings nothing new.

        Digests are asked for (DIGESTS_WANTED) only of a put that repeats something: to see whether it is the same.
        """
        ledger, keys, started = self.ledger, unpack_keys(packed), time.monotonic()
        writes = {name: ColumnWrite.from_data(write) for name, write in data.items()}
        if ledger.wants_digests(keys, writes):
            return DIGESTS_WANTED
        ledger.check_put(keys, writes)
        is_entry = any(key not in ledger.book.samples for key in keys)

        def attempt() -> Reservation | str | None:
            if ledger.wants_digests(keys, writes):
                return DIGESTS_WANTED
            columns = ledger.new_columns(keys, writes)
            if not columns:
                return "nothing new"
            if request_id in self._withdrawn:
                return "withdrawn"
            if is_entry and self._additions:
                return None
            return ledger.reserve(keys, writes, columns, node, holder, time.monotonic(), request_id)

        reservation = await (self._entries if is_entry else self._additions).wait(attempt, wait)
        self._withdrawn.discard(request_id)
        self._serve_puts()
        if reservation is None:
            raise DockTimeout(explain_put(ledger, keys, writes, time.monotonic() - started))
        if isinstance(reservation, str):
            return reservation if reservation == DIGESTS_WANTED else None
        self._watch_holder(holder)
        return [time.monotonic() - started, list(reservation)]

    async def do_move(self, wait: float, ticket: int) -> list[Any]:
        """Other memory for a reservation whose extent somebody still looks at."""
        end = time.monotonic() + wait
        while (found := self.ledger.move(ticket, time.monotonic())) is None:
            if time.monotonic() > end:
                raise DockTimeout(f"readers still look at all free memory of the dock after {wait:.1f} s")
            await asyncio.sleep(BUSY_RETRY)
        return list(found)

    async def do_commit(self, wait: float, ticket: int, packed: np.ndarray, data: Mapping[str, Any]) -> None:
        """Make a put visible; repeating it changes nothing."""
        keys, writes = unpack_keys(packed), {name: ColumnWrite.from_data(write) for name, write in data.items()}
        self._serve(self.ledger.commit(ticket, keys, writes))

    async def do_cancel(self, wait: float, ticket: int) -> None:
        self.ledger.cancel(ticket)

    async def do_lease(self, wait: float, request: Mapping[str, Any], holder: list[Any]) -> list[Any]:
        """A lease on `minimum` to `count` ready samples, as soon as there are enough, and where their columns lie."""
        ledger, started, wanted = self.ledger, time.monotonic(), LeaseRequest(**request)
        ledger.check_request(wanted)

        def attempt() -> Grant | str | None:
            if wanted.request_id in self._withdrawn:
                return "withdrawn"
            try:
                return ledger.lease(wanted, holder, time.monotonic())
            finally:
                # Dropping what is stale makes room.
                self._serve_puts()

        found = await self._gets[wanted.consumer].wait(attempt, wait)
        self._withdrawn.discard(wanted.request_id)
        if found is None:
            raise DockTimeout(explain_get(ledger, wanted, time.monotonic() - started))
        if isinstance(found, str):
            raise DockTimeout("the get was withdrawn")
        self._watch_holder(holder)
        if wanted.balance:
            # A plan has parts for others who wait.
            self._gets[wanted.consumer].serve()
        reads = ledger.read(found.keys, self.settings.consumers[wanted.consumer])
        columns = {name: read.as_data() for name, read in reads.items()}
        return [time.monotonic() - started, found.ticket, pack_keys(found.keys), list(found.ages), columns]

    async def do_withdraw(self, wait: float, consumer: str | None, request_id: bytes) -> None:
        """Forget a get (or, with no consumer, a put) whose caller has gone away."""
        self._withdrawn.add(request_id)
        self._serve(self.ledger.withdraw(request_id) | ({consumer} if consumer else set()))

    async def do_holds(self, wait: float, ticket: int, packed: np.ndarray) -> bool:
        return self.ledger.holds(ticket, unpack_keys(packed))

    async def do_ack(self, wait: float, consumer: str, ticket: int, packed: np.ndarray) -> None:
        self.ledger.ack(consumer, ticket, unpack_keys(packed))

    async def do_release(self, wait: float, ticket: int, packed: np.ndarray) -> None:
        self._serve(self.ledger.release(ticket, unpack_keys(packed)))

    async def do_status(self, wait: float) -> dict[str, Any]:
        waiting = {consumer: len(line) for consumer, line in self._gets.items()}
        puts = len(self._additions) + len(self._entries)
        return self.ledger.status() | {"gets_waiting": waiting, "puts_waiting": puts}

    async def do_close_step(self, wait: float, step: int, carry_unfinished: bool, request_id: bytes) -> int:
        dropped = self.ledger.close_step(step, carry_unfinished, request_id)
        # Gets that wait for this step fail now instead of at their deadline.
        self._serve(set(self.settings.consumers))
        return dropped

    async def do_clear(self, wait: float) -> int:
        """Close every step that has samples here."""
        steps = sorted({key.step for key in self.ledger.book.samples})
        return sum([await self.do_close_step(wait, step, False, b"") for step in steps])

    async def do_pin(self, wait: float) -> list[Any]:
        """Keep the payload that is here now where it is, for a checkpoint; its number and the dock's state."""
        return [self.ledger.pin(), self.ledger.book.state()]

    async def do_unpin(self, wait: float, ticket: int) -> None:
        self.ledger.unpin(ticket)

    async def do_restore(self, wait: float, state: Any, moved: list[Any], request_id: bytes) -> None:
        self._serve(self.ledger.restore(state, moved, request_id))

    async def do_close(self, wait: float) -> None:
        """Remove the dock's files, on every node."""
        self._is_closed = True
        await self.nodes.close()


def _history(
    records: Sequence[tuple[str, Sequence[Any]]],
) -> tuple[dict[str, str], Any, list[tuple[str, Sequence[Any]]]]:
    """What a journal tells: arena files by node, the last written state, and the transitions after it."""
    attached: dict[str, str] = {}
    state: Any = None
    transitions: list[tuple[str, Sequence[Any]]] = []
    for kind, args in records:
        if kind == "attach":
            attached[args[0]] = args[1]
        elif kind == "state":
            state, transitions = args[0], []
        else:
            transitions.append((kind, args))
    return attached, state, transitions
