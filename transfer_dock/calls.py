"""Calls to the controller, from blocking code and from an event loop, across a restart of the controller.

A dock operation is written once, as a generator that yields what it needs (a `Call` to the controller, a `Work` to do
in this process) and is sent the answer; `Caller.run` and `Caller.arun` drive it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError

from transfer_dock import errors, wire
from transfer_dock.errors import DockClosed, DockError, DockTimeout

Result = TypeVar("Result")

# What a call may take beyond the wait it asked for, before the controller counts as unreachable; seconds. A killed
# controller is back after about two.
REPLY_GRACE = 30.0


class Call(NamedTuple):
    """Ask the controller's `method`; it may wait until `deadline` (monotonic seconds of this process), and then take
    `grace` seconds more to answer."""

    method: str
    args: tuple[Any, ...]
    deadline: float = 0.0
    grace: float = REPLY_GRACE


class Work(NamedTuple):
    """Do something long in this process: beside the event loop, if there is one."""

    function: Callable[[], Any]


Steps = Generator[Call | Work, Any, Result]


def ask(method: str, *args: Any, grace: float = REPLY_GRACE) -> Steps[Any]:
    """The operation that is one call, and no wait."""
    return (yield Call(method, args, grace=grace))


class Caller:
    """Drives operations against one controller."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller

    def run(self, steps: Steps[Result]) -> Result:
        """The operation's result; blocks."""
        try:
            need = next(steps)
            while True:
                try:
                    answer = self._call(need) if isinstance(need, Call) else need.function()
                except BaseException as error:  # noqa: BLE001 - the operation cleans up and raises it again
                    need = steps.throw(error)
                else:
                    need = steps.send(answer)
        except StopIteration as done:
            return done.value

    async def arun(self, steps: Steps[Result]) -> Result:
        """The operation's result; the event loop goes on meanwhile."""
        try:
            need = next(steps)
            while True:
                try:
                    answer = await (self._acall(need) if isinstance(need, Call) else asyncio.to_thread(need.function))
                except BaseException as error:  # noqa: BLE001 - the operation cleans up and raises it again
                    need = steps.throw(error)
                else:
                    need = steps.send(answer)
        except StopIteration as done:
            return done.value

    def tell(self, method: str, *args: Any) -> None:
        """Send a call and don't wait for it."""
        self._submit(Call(method, args))

    def _call(self, call: Call) -> Any:
        patience = _Patience(call)
        while True:
            try:
                reply = ray.get(self._submit(call), timeout=patience.left())
            except (GetTimeoutError, RayActorError) as error:
                patience.check(error)
            else:
                return _result(reply)

    async def _acall(self, call: Call) -> Any:
        patience = _Patience(call)
        while True:
            try:
                reply = await asyncio.wait_for(self._submit(call), patience.left())
            except (TimeoutError, RayActorError) as error:
                patience.check(error)
            else:
                return _result(reply)

    def _submit(self, call: Call) -> Any:
        wait = max(call.deadline - time.monotonic(), 0.0)
        return self.controller.answer.remote(call.method, wire.pack(call.args), wait)


class _Patience:
    """How long a call is tried. A controller that was killed restarts: Ray holds the next call until it is there."""

    def __init__(self, call: Call) -> None:
        self.method = call.method
        self.started = time.monotonic()
        self.end = max(call.deadline, self.started) + call.grace

    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)

    def check(self, error: Exception) -> None:
        """Return if the call may be tried again. Raises: DockTimeout, DockClosed."""
        if not isinstance(error, RayActorError) or not self.left():
            seconds = time.monotonic() - self.started
            raise DockTimeout(f"the dock's controller did not answer {self.method} in {seconds:.0f} s") from None
        if not isinstance(error, ActorUnavailableError):
            reason = str(error).splitlines()[0]
            raise DockClosed(f"{self.method} found the dock's controller gone: {reason}") from None


def answer(result: Any) -> bytes:
    """A reply as the controller sends it."""
    return wire.pack([None, result])


def refusal(error: DockError) -> bytes:
    """A DockError as the controller sends it: its name and message, never a pickled exception."""
    return wire.pack([type(error).__name__, str(error)])


def _result(reply: bytes) -> Any:
    kind, value = wire.unpack(reply)
    if kind is not None:
        raise getattr(errors, kind)(value)
    return value
