"""Memory of the KV cache goes back to the system and comes back as zeros."""

import mmap

import psutil
import pytest
import torch

from qerl_rl.rollout.kv_cache import KvCacheMemory


@pytest.mark.parametrize("count", [1, 1000, 3 * mmap.PAGESIZE + 5, 40 << 20])
def test_what_was_in_the_cache_is_gone_and_the_tensors_stay(count):
    cache = torch.full((count,), 255, dtype=torch.uint8)
    address = cache.data_ptr()
    caches = KvCacheMemory([cache, cache[: count // 2]])
    assert caches.nbytes == count
    before = psutil.Process().memory_info().rss
    assert caches.release() == count
    freed = before - psutil.Process().memory_info().rss
    assert freed > 0.9 * count - 4 * mmap.PAGESIZE
    assert (caches.nbytes, caches.release()) == (0, 0)
    caches.restore()
    assert caches.nbytes == count
    assert cache.data_ptr() == address
    assert not cache.any()
    cache.fill_(3)
    assert (cache == 3).all()


def test_bytes_beside_the_cache_on_its_pages_are_kept():
    memory = torch.full((6 * mmap.PAGESIZE,), 7, dtype=torch.uint8)
    inner = torch.frombuffer(memory.numpy(), dtype=torch.uint8, offset=100, count=4 * mmap.PAGESIZE)
    caches = KvCacheMemory([inner])
    caches.release()
    assert not inner.any()
    assert (memory[:100] == 7).all()
    assert (memory[100 + 4 * mmap.PAGESIZE :] == 7).all()
