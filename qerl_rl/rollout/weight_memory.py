"""The memory that the weights of a vLLM model take, including what its CPU layers have packed away: how much it is, and
how it is given back for a while.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch

from qerl_rl.platform.host_pages import drop_pages


class ByteStore(Protocol):
    """Where bytes stay that leave memory."""

    def write(self, slot: int, data: torch.Tensor) -> None:
        """Keep uint8 [n] `data` under `slot`; a slot always gets the same n."""

    def read(self, slot: int, data: torch.Tensor) -> None:
        """Fill uint8 [n] `data` with what `slot` keeps."""


class WeightMemory:
    """The weights of one rank's model in memory of the host, which can leave it as a KV cache does: addresses stay.

    What lies in a oneDNN handler can't leave, since nothing but an address is known of it; vectors (norms, biases) and
    what fills no page are not worth it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._all = model, weight_bytes(model)
        self._slots: dict[str, int] = {}
        self._written: set[int] = set()
        self._away: dict[int, torch.UntypedStorage] = {}
        self._store: ByteStore | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory now."""
        return self._all - sum(storage.nbytes() for storage in self._away.values())

    @property
    def is_away(self) -> bool:
        """Whether weights are out of memory; the model can't run then."""
        return bool(self._away)

    def changed(self) -> None:
        """Other weights were written: what a store keeps is out of date, and what was away is there."""
        self._written, self._away = set(), {}

    def release(self, store: ByteStore | None, keep: Collection[int] = ()) -> int:
        """Free the memory; returns the bytes freed.

        store: where the weights stay, which are written there the first time and after each change; always the same
        one. None gives them up: all have to be written anew. keep: addresses of storages that others read.
        """
        if self._away:
            return 0
        self._store = store
        for key, storage in self._storages().items():
            if storage.data_ptr() in keep:
                continue
            slot = self._slots.setdefault(key, len(self._slots))
            if store is not None and slot not in self._written:
                store.write(slot, _bytes(storage))
                self._written.add(slot)
            drop_pages(storage.data_ptr(), storage.nbytes())
            self._away[slot] = storage
        return sum(storage.nbytes() for storage in self._away.values())

    def restore(self) -> None:
        """Bring the weights back bit for bit. Raises: RuntimeError when they were given up."""
        if self._away and self._store is None:
            raise RuntimeError("the engine's weights were given up: write all of them through weight_target()")
        for slot, storage in self._away.items():
            assert self._store is not None
            self._store.read(slot, _bytes(storage))
        self._away = {}

    def make_writable(self) -> None:
        """Nothing is needed: pages that were given up come back when they are written."""

    def _storages(self) -> dict[str, torch.UntypedStorage]:
        """What can leave, each storage once, by a name that stays when a module is packed anew."""
        found: dict[int, tuple[str, torch.UntypedStorage]] = {}
        for path, module in self._model.named_modules():
            named = [(f"{path}.{name}", tensor) for name, tensor in module.named_parameters(recurse=False)]
            named += [(f"{path}:{number}", packed) for number, (packed, _) in enumerate(_packed(module))]
            for name, tensor in named:
                # The shape beside int4 weights is in no resharding, and in no kernel.
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and not name.endswith("weight_shape"):
                    storage = tensor.untyped_storage()
                    if storage.nbytes() >= mmap.PAGESIZE:
                        found.setdefault(storage.data_ptr(), (name, storage))
        return dict(found.values())


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights of one rank, each storage once.

    CPU layers hand their weight to a kernel, which keeps a copy in its own layout: as a tensor that only a closure
    knows, or inside a oneDNN handler that has nothing but its sizes to show.
    """
    tensors: dict[int, int] = {}
    handlers: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[tensor.data_ptr()] = tensor.nbytes
    for module in model.modules():
        for packed, item_size in _packed(module):
            if isinstance(packed, torch.Tensor):
                tensors[packed.data_ptr()] = packed.nbytes
            elif hasattr(packed, "handler_tensor"):
                handlers[id(packed)] = packed.k * packed.n * item_size
    return sum(tensors.values()) + sum(handlers.values())


def drop_unused_copies(model: Any) -> None:
    """Free the copy of the input embedding that vLLM packs for matrix products: it is only ever looked up."""
    for path, module in model.named_modules():
        if path.endswith("embed_tokens") and module is not model.lm_head and hasattr(module, "cpu_linear"):
            module.cpu_linear = None


def _packed(module: torch.nn.Module) -> Iterator[tuple[Any, int]]:
    """What the kernels of a layer hold, and the bytes of one of its numbers."""
    unquantized = getattr(module, "cpu_linear", None)
    for cell in getattr(unquantized, "__closure__", None) or ():
        yield cell.cell_contents, module.weight.itemsize
    quantized = getattr(getattr(module, "scheme", None), "kernel", None)
    yield getattr(quantized, "dnnl_handler", None), torch.int8.itemsize
