"""What would run as a kernel of the simulated NPU runs on the CPU, on views of the same memory (acl.c).

It proves no numerics, NZ formats, kernel limits or speed: what is computed is what this file and `operators` say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

HOST = torch.device("cpu")
OWN = ("empty", "set_", "resize", "record_stream", "pin", "_copy_from", "storage", "_has_compat", "alias", "detach")
"""Parts of names of aten operators that torch_npu's own implementation is right for: they handle memory, not values."""
UNUSED = (
    "_local_scalar_dense",
    "npu",
    "rename",
    "is_set_to",
    "_nested",
    "sparse",
    "quantize",
    "lstm",
    "gru",
    "rnn",
    "fft_",
)
"""Left as they are, with an error where one of them needs a kernel."""
kept: list[torch.library.Library] = []
"""A library that is freed takes its kernels along."""


def is_simulated(value: Any) -> bool:
    """Whether this is a tensor on the simulated device."""
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def host_view(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor in the memory of a simulated one: what is written to either is read from both."""
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), HOST, storage.nbytes())
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a CPU tensor on the simulated device, with its strides."""
    copied = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        host_view(copied).copy_(tensor)
    return copied


def kernel(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, which takes and returns CPU tensors, as a kernel of the simulated device.

    An argument that it returns comes back as the tensor that was passed, so that operators in place work.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        device: torch.device | None = None
        passed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def to_host(value: Any) -> Any:
            nonlocal device
            if is_simulated(value):
                device = device or value.device
                if id(value) not in passed:
                    passed[id(value)] = (value, host_view(value))
                return passed[id(value)][1]
            if isinstance(value, torch.device) and value.type == "npu":
                device = value
                return HOST
            return value

        wanted = kwargs.get("device")
        kwargs = {name: tree_map(to_host, value) for name, value in kwargs.items() if name != "pin_memory"}
        found = compute(*tree_map(to_host, args), **kwargs)
        if wanted is not None and torch.device(wanted).type == "cpu":
            return found
        if device is None or device.index is None:
            device = torch.device("npu", torch.npu.current_device())
        originals = {id(view): original for original, view in passed.values()}

        def back(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or is_simulated(value):
                return value
            return originals[id(value)] if id(value) in originals else to_device(value, device)

        return tree_map(back, found)

    return run


def install() -> None:
    """Give every aten kernel of torch_npu that computes values its CPU counterpart."""
    library = torch.library.Library("aten", "IMPL")
    kept.append(library)
    for name, operator in registered("PrivateUse1"):
        if any(part in name for part in OWN + UNUSED) or name == "copy_" or _returns_view(operator):
            continue
        library.impl(name, kernel(operator), "PrivateUse1", allow_override=True)
    library.impl("copy_", _copy, "PrivateUse1", allow_override=True)
    library.impl("contiguous", _contiguous, "PrivateUse1", allow_override=True)
    # torch_npu differentiates some operators of many parts itself, with kernels that are not there: torch's own
    # decomposition takes their place.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, operator in registered("AutogradPrivateUse1"):
        if has_kernel(f"aten::{name}", "CompositeImplicitAutograd"):
            library.impl(name, operator.decompose, "AutogradPrivateUse1", allow_override=True)
            if has_kernel(f"aten::{name}", "PrivateUse1"):
                library.impl(name, operator.decompose, "PrivateUse1", allow_override=True)


def registered(key: str, of: str = "aten") -> list[tuple[str, Any]]:
    """(name with overload, operator) of the namespace `of` that torch_npu registered for a dispatch key."""
    found = []
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        namespace, name = qualified.split("::")
        base, _, overload = name.partition(".")
        operator = getattr(getattr(getattr(torch.ops, of), base, None), overload or "default", None)
        if namespace == of and operator is not None:
            found.append((name, operator))
    return found


def _returns_view(operator: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in operator._schema.returns)


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    first, second = (host_view(tensor) if is_simulated(tensor) else tensor for tensor in (target, source))
    first.copy_(second)
    return target


def _contiguous(tensor: torch.Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return to_device(host_view(tensor).contiguous(memory_format=memory_format), tensor.device)


def install_kernels(kernels: dict[str, Callable[..., Any]]) -> None:
    """Give operators of torch_npu these CPU implementations.

    They get what the schema requires by position, and everything that has a default by its name in the schema.
    Raises: AttributeError when torch_npu has no such operator.
    """
    library = torch.library.Library("npu", "IMPL")
    kept.append(library)
    for name, compute in kernels.items():
        named = _by_schema(getattr(torch.ops.npu, name).default._schema, compute)
        library.impl(name, kernel(named), "PrivateUse1", allow_override=True)


def _by_schema(schema: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    # The dispatcher leaves out arguments that have their default.
    required = [argument.name for argument in schema.arguments if not argument.has_default_value()]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
        by_position = [given.pop(name) for name in required]
        return compute(*by_position, **(defaults | given))

    return run
