"""Memory of the host that processes of one machine share, without a name that a crash could leave behind."""

from __future__ import annotations

import mmap
import os
import uuid
import weakref
from typing import NamedTuple

import torch


class Address(NamedTuple):
    """Where another process finds a block: a process of this machine, its open file, and what that must be."""

    process: int
    file: int
    title: str


class SharedBlock:
    """A block of host memory that its owner makes larger, and that other processes map.

    The kernel frees it with the last process that has it open. It is no file under /dev/shm, whose size containers
    limit to 64 MiB unless told otherwise.
    """

    def __init__(self, address: Address, file: int) -> None:
        self.address = address
        self._file = file
        self._bytes = torch.empty(0, dtype=torch.uint8)
        weakref.finalize(self, os.close, file)

    @classmethod
    def create(cls) -> SharedBlock:
        """An empty block of this process.

        Raises: OSError where the system has no memory files.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory files (Linux has)")
        title = f"qerl-rl-{uuid.uuid4().hex}"
        file = os.memfd_create(title)
        return cls(Address(os.getpid(), file, title), file)

    @classmethod
    def open(cls, address: Address) -> SharedBlock:
        """The block of another process of this machine.

        Raises: OSError when there is none: the address is of another machine or container, or its owner has ended.
        """
        path = f"/proc/{address.process}/fd/{address.file}"
        # A process of the same number elsewhere has other files.
        if address.title not in os.readlink(path):
            raise OSError(f"{path} is not {address.title}")
        return cls(address, os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def grow(self, nbytes: int) -> None:
        """Make the block at least `nbytes` large; its contents stay. For the owner."""
        if nbytes > os.fstat(self._file).st_size:
            os.truncate(self._file, nbytes)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8, the memory itself.

        Raises: ValueError when the block is not that large.
        """
        if offset + nbytes > self._bytes.numel():
            size = os.fstat(self._file).st_size
            if offset + nbytes > size:
                raise ValueError(f"bytes {offset} to {offset + nbytes} of a shared block of {size}")
            # Views of the smaller mapping keep that one alive.
            self._bytes = torch.frombuffer(mmap.mmap(self._file, size), dtype=torch.uint8)
        return self._bytes[offset : offset + nbytes]
