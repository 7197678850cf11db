"""How much memory the weights of a vLLM model take, including what its CPU layers have packed away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


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
