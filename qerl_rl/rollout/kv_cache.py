"""The engine's KV cache, given back to the system and taken again."""

from __future__ import annotations

import torch


class KvCacheMemory:
    """The storages behind a model runner's KV caches.

    They are resized in place: the layers keep their tensors, so nothing has to be bound again (vLLM's own way,
    initialize_kv_cache_tensors, leaks when it is run a second time, and its sleep mode does nothing on CPU).
    """

    def __init__(self, kv_caches: list[torch.Tensor]) -> None:
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in kv_caches}
        self._storages = [(storage, storage.nbytes()) for storage in storages.values()]

    def release(self) -> int:
        """Free the memory; returns the bytes freed."""
        freed = self.nbytes
        for storage, _ in self._storages:
            storage.resize_(0)
        return freed

    def restore(self) -> None:
        """Allocate what was freed; the contents are undefined, so the prefix cache must have been reset."""
        for storage, size in self._storages:
            if storage.nbytes() != size:
                storage.resize_(size)

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage, _ in self._storages)
