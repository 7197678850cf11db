"""What can go wrong in a dock: every error is a DockError with one message, and travels between processes as data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DockError(Exception):
    """Base of everything that the dock raises on purpose."""


class DockTimeout(DockError, TimeoutError):
    """A put or a get passed its deadline; the message says what it waited for."""


class DockClosed(DockError):
    """The controller of the dock is gone: closed, killed, or its node is lost."""


class LeaseLost(DockError):
    """An acknowledgement came too late: the samples went back to the pool, or left the dock with their step."""


class ConflictingPut(DockError):
    """A (key, column) that the dock holds was put again with another value."""


class ColumnMismatch(DockError, ValueError):
    """A value does not have the declared dtype, the row shape of its column, or one row for each key."""


class InvalidRequest(DockError, ValueError):
    """Arguments that can never succeed: a count of no whole groups, a put larger than the dock, a repeated key."""


class StepClosed(DockError):
    """The samples' step was closed: nothing can be put into it or read from it any more."""


class PayloadLost(DockError):
    """The metadata is there but its bytes are not: the process that put them died, or the object store lost them."""


class UnknownColumn(DockError, LookupError):
    """A column that the dock was not created with."""


class UnknownConsumer(DockError, LookupError):
    """A consumer that the dock was not created with."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that isn't declared: it gives the nearest declared one."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"the dock has no {kind} {name!r}; {hint}declared: {', '.join(names)}"
