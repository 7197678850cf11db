"""Pages of host memory, given back to the system while the addresses stay."""

from __future__ import annotations

import ctypes
import mmap

import torch


def is_host_memory(storage: torch.UntypedStorage) -> bool:
    """Whether pages of it can be dropped. A card's allocator takes back whole blocks only."""
    return storage.device.type == "cpu"


def drop_pages(address: int, count: int) -> None:
    """Make `count` bytes from `address` on zeros that take no memory; those on shared first and last pages are written.

    Raises: OSError when the system refuses.
    """
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = max(begin, (address + count) // mmap.PAGESIZE * mmap.PAGESIZE)
    ctypes.memset(address, 0, min(begin - address, count))
    ctypes.memset(end, 0, max(address + count - end, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "the system does not take the pages back")
