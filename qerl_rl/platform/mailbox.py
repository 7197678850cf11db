"""Short messages between processes of one machine through pipes: a system call each, and no thread in between."""

from __future__ import annotations

import os
import select
import struct
import weakref
from time import perf_counter
from typing import NamedTuple

_MESSAGE = struct.Struct("5q")
"""Far below what a pipe takes in one piece, whoever else writes."""
_LOOK_S = 1.0
"""How often a reader that waits looks whether the writer still lives."""


class MailAddress(NamedTuple):
    """Where another process of this machine finds a mailbox: a process, its open file, and what that must be."""

    process: int
    file: int
    title: str


class Mailbox:
    """Takes messages of five integers, in the order in which each writer wrote them."""

    def __init__(self) -> None:
        self._file, written = os.pipe2(os.O_CLOEXEC)
        self.address = MailAddress(os.getpid(), written, os.readlink(f"/proc/self/fd/{written}"))
        self._poll = select.poll()
        self._poll.register(self._file, select.POLLIN)
        for file in (self._file, written):
            weakref.finalize(self, os.close, file)

    def take(self, timeout_s: float, writer: int) -> tuple[int, ...]:
        """The next message, of whichever process.

        Args: writer: the process that is waited for.
        Raises: TimeoutError; RuntimeError when the writer has ended.
        """
        deadline = perf_counter() + timeout_s
        while (left := deadline - perf_counter()) > 0:
            if self._poll.poll(1e3 * min(left, _LOOK_S)):
                return _MESSAGE.unpack(os.read(self._file, _MESSAGE.size))
            if not os.path.exists(f"/proc/{writer}"):
                raise RuntimeError(f"process {writer} has ended")
        raise TimeoutError(f"nothing in {timeout_s:g} s")


class Outbox:
    """The mailbox of another process, to write to.

    Raises: OSError when there is none: the address is of another machine or container, or its owner has ended.
    """

    def __init__(self, address: MailAddress) -> None:
        path = f"/proc/{address.process}/fd/{address.file}"
        if os.readlink(path) != address.title:
            raise OSError(f"{path} is not {address.title}")
        self.process = address.process
        self._file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def put(self, *numbers: int) -> None:
        """Write a message of five integers; waits only where a thousand lie unread.

        Raises: RuntimeError when the reader has closed its mailbox, or ended.
        """
        try:
            os.write(self._file, _MESSAGE.pack(*numbers))
        except BrokenPipeError:
            raise RuntimeError(f"process {self.process} has closed its mailbox") from None
