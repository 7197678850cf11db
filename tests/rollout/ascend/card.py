"""A card's memory as vllm-ascend's allocator sees it: blocks that it maps and unmaps, under its real classes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from tests.rollout.ascend.layers import Importer

CAPACITY = 1 << 30
TO_HOST, TO_DEVICE = 2, 1
"""acl.rt.memcpy's kinds."""


class Card:
    """What is allocated, and what of it is mapped; a block that is not holds anything.

    Args: load: of `wheel`, with camem and worker among its modules.
    """

    def __init__(self, load: Importer) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._mapped: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []
        camem = load("vllm_ascend.device_allocator.camem")
        camem.python_create_and_map, camem.python_unmap_and_release = self._map, self._unmap  # type: ignore[attr-defined]
        camem.memcpy = self._copy  # type: ignore[attr-defined]
        device = SimpleNamespace(empty_cache=lambda: None, mem_get_info=lambda: (CAPACITY - self.used, CAPACITY))
        # Without a card no memory can be pinned.
        camem.torch = SimpleNamespace(  # type: ignore[attr-defined]
            empty=lambda *shape, dtype, device, pin_memory: torch.empty(*shape, dtype=dtype),
            uint8=torch.uint8,
            npu=device,
        )
        torch.npu = device  # type: ignore[attr-defined]
        self.allocator = camem.CaMemAllocator.get_instance()

    @property
    def used(self) -> int:
        return sum(self._mapped.values())

    def allocate(self, tag: str, tensors: Iterable[torch.Tensor]) -> None:
        """The memory of these tensors is of this card, and was allocated under this tag."""
        with self.allocator.use_allocation_tag(tag):
            for storage in {each.data_ptr(): each.untyped_storage() for each in tensors}.values():
                handle = (0, storage.nbytes(), storage.data_ptr(), 0)
                self.allocator.python_malloc_callback(handle)
                self._mapped[handle[2]] = handle[1]
                self._kept.append(torch.empty(0, dtype=torch.uint8).set_(storage))

    def _map(self, device: int, size: int, address: int, handle: int) -> None:
        assert address not in self._mapped, "mapped twice"
        self._mapped[address] = size

    def _unmap(self, device: int, size: int, address: int, handle: int) -> None:
        assert self._mapped.pop(address) == size
        ctypes.memset(address, 0xA5, size)

    def _copy(self, to: int, most: int, of: int, size: int, kind: int) -> None:
        assert (of if kind == TO_HOST else to) in self._mapped
        ctypes.memmove(to, of, size)


def worker_on(card: Card, load: Importer, model: torch.nn.Module, config: SimpleNamespace) -> Any:
    """A worker with vllm-ascend's own `sleep` and `wake_up`, which notes their calls."""
    real: Any = load("vllm_ascend.worker.worker")
    real.GiB_bytes = 1 << 30

    class Worker:
        def __init__(self) -> None:
            self.vllm_config, self.model_runner = config, SimpleNamespace(model=model)
            self._sleep_saved_buffers: dict[str, torch.Tensor] = {}

        def sleep(self, level: int = 1) -> None:
            card.calls.append(("sleep", level))
            real.NPUWorker.sleep(self, level)

        def wake_up(self, tags: list[str] | None = None) -> None:
            card.calls.append(("wake_up", tags))
            real.NPUWorker.wake_up(self, tags)

    return Worker()
