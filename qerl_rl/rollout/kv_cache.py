"""The engine's KV cache, given back to the system and taken again."""

from __future__ import annotations

import torch

from qerl_rl.platform.host_pages import drop_pages


class KvCacheMemory:
    """The storages behind a model runner's KV caches, in memory of the host.

    Their pages go back to the system while the addresses stay: the layers keep their tensors, nothing has to be bound
    again (vLLM's own way, initialize_kv_cache_tensors, leaks when it is run a second time, and its sleep mode does
    nothing on CPU). A page comes back as zeros when it is first touched, so a cache of any size is restored at once.
    """

    def __init__(self, kv_caches: list[torch.Tensor]) -> None:
        storages = {cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in kv_caches}
        self._storages, self._is_away = list(storages.values()), False

    def release(self) -> int:
        """Free the memory; returns the bytes freed. The prefix cache must have been reset."""
        freed = self.nbytes
        if freed:
            for storage in self._storages:
                drop_pages(storage.data_ptr(), storage.nbytes())
        self._is_away = True
        return freed

    def restore(self) -> None:
        """Take the memory again, filled with zeros.

        What is in slots that no token has written must be finite: attention multiplies it by a probability of 0.
        """
        self._is_away = False

    @property
    def nbytes(self) -> int:
        return 0 if self._is_away else sum(storage.nbytes() for storage in self._storages)
