"""Run Megatron-core 0.12.1 on CPU and gloo: the counterpart of torch_npu's transfer_to_npu.

Every patch is a function of its own whose docstring says what breaks without it. The patches on torch translate `cuda`
into `cpu` and leave every other argument alone, so vLLM and transformers work beside them in the same process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")


class PatchError(RuntimeError):
    """A patch does not apply: the code it replaces has changed, or was imported too early."""


def existing(owner: Any, name: str) -> Any:
    """`owner.name`. Raises: PatchError when there is no such attribute: the patch was written for another version."""
    if not hasattr(owner, name):
        raise PatchError(f"{getattr(owner, '__name__', owner)} has no {name}: this patch is for another version of it")
    return getattr(owner, name)


def replace(owner: Any, name: str, value: Any) -> Any:
    """Set `owner.name` to `value` and return what was there. Raises: PatchError when there is no such attribute."""
    original = existing(owner, name)
    setattr(owner, name, value)
    return original


def apply() -> None:
    """Apply all patches; see `prepare_megatron`.

    Raises: PatchError when megatron was imported before, or lacks what a patch replaces.
    """
    # `megatron` alone is a namespace that libraries create when they only look whether megatron.core is installed.
    if "megatron.core" in sys.modules:
        raise PatchError("megatron.core is imported already: call prepare_megatron before anything imports it")
    for patch in (current_device, streams, random_state, device_arguments, tensor_type_names, warnings_without_remedy):
        patch()
    with compilation_off():
        importlib.import_module("megatron.core")
    for patch in (tracked_random_state, empty_fp8_shards, alltoall_splits, uneven_shares):
        patch()


# ---- torch: what is asked of CUDA is answered by the CPU


def current_device() -> None:
    """Megatron passes torch.cuda.current_device() on as `device=`; without CUDA it raises. Pipelines synchronize."""
    replace(torch.cuda, "current_device", lambda: CPU)
    replace(torch.cuda, "synchronize", lambda device=None: None)


class InstantStream:
    """A stream, or an event, of a device that finishes everything before the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        """Nothing is outstanding."""

    wait_stream = wait_event = synchronize = record = wait

    def record_event(self, event: Any = None) -> InstantStream:
        return self

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        # Megatron asks whether it is on its side stream, to order copies that are instantaneous here.
        return isinstance(other, InstantStream)

    __hash__ = object.__hash__


def streams() -> None:
    """The token dispatcher and DDP create CUDA streams when they are built, which raises without CUDA."""
    replace(torch.cuda, "Stream", InstantStream)
    replace(torch.cuda, "Event", InstantStream)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, lambda device=None: InstantStream())


def random_state() -> None:
    """Megatron's RNG tracker seeds and reads the CUDA generators, of which there are none.

    manual_seed goes to the default generator itself: torch.manual_seed calls back into torch.cuda and could recurse.
    """
    for module in (torch.cuda, torch.cuda.random):
        replace(module, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        replace(module, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state))
        replace(module, "manual_seed", lambda seed: torch.default_generator.manual_seed(int(seed)))


def _without_cuda(device: Any) -> Any:
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    return CPU if isinstance(device, torch.device) and device.type == "cuda" else device


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _without_cuda(kwargs["device"])
        return factory(*args, **kwargs)

    return build


def device_arguments() -> None:
    """Optimizer, schedules and masks create tensors with device="cuda" or move them by .cuda(), which raises."""
    # torch.device contexts (transformers builds models on "meta" in one) know factories by identity, collected on first
    # use: collected after the wrapping they would miss every real factory, and HF models give silently wrong logits.
    importlib.import_module("torch._dynamo")
    importlib.import_module("torch.utils._device")._device_constructors()
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        replace(torch, name, _on_cpu(existing(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        replace(owner, "cuda", lambda self, *args, **kwargs: self)


def tensor_type_names() -> None:
    """Megatron's optimizers tell parameters apart by the string "torch.cuda.FloatTensor" and raise for any other.

    Only Megatron gets that answer; every other caller of Tensor.type sees the truth.
    """
    original = existing(torch.Tensor, "type")

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    replace(torch.Tensor, "type", type_name)


def warnings_without_remedy() -> None:
    """Every worker prints that Apex and Transformer Engine are missing and that torch renamed collectives."""
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", message=r".torch\.distributed\.\w+_tensor. is deprecated", category=FutureWarning)


# ---- Megatron


@contextlib.contextmanager
def compilation_off() -> Iterator[None]:
    """Megatron binds jit_fuser = torch.compile when it is imported: minutes of C++ compilation, which then fails.

    Inside, torch.compile gives its function back; afterwards it is the real one again, for vLLM and transformers.
    """

    def uncompiled(function: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    original = replace(torch, "compile", uncompiled)
    try:
        jit = importlib.import_module("megatron.core.jit")
        if getattr(jit, "jit_fuser", None) is not uncompiled:
            raise PatchError("megatron.core.jit no longer takes jit_fuser from torch.compile")
        yield
    finally:
        torch.compile = original


def tracked_random_state() -> None:
    """The tracker sets its state by a callback that waits for CUDA to start: silently no state is ever set."""
    module = importlib.import_module("megatron.core.tensor_parallel.random")
    replace(module, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    replace(module, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))


def empty_fp8_shards() -> None:
    """The distributed optimizer hands its FP8 parameters over even when it has none; without TE that call raises."""
    module = importlib.import_module("megatron.core.fp8_utils")
    name = "_quantize_param_shard_impl"

    def quantize_shards(parameters: list, *args: Any, **kwargs: Any) -> None:
        if parameters:
            original(parameters, *args, **kwargs)

    original = replace(module, name, quantize_shards)


def alltoall_splits() -> None:
    """The all-to-all dispatcher turns split sizes into numpy only when they come from a GPU; tensors raise in gloo."""
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace(module, "maybe_move_tensor_to_cpu", to_host)


def uneven_shares() -> None:
    """Gloo gathers and scatters equal shares only: expert tensor parallelism beside expert parallelism raises."""
    module = importlib.import_module("megatron.core.tensor_parallel.mappings")

    def is_uneven(sizes: list[int] | None) -> bool:
        return sizes is not None and len(set(sizes)) > 1

    def gather(share: torch.Tensor, group: Any = None, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if not is_uneven(sizes):
            return original_gather(share, group, sizes, use_global_buffer)
        padded = share.new_zeros(max(sizes), *share.shape[1:])
        padded[: share.size(0)] = share
        found = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(found, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    def reduce_scatter(
        full: torch.Tensor, group: Any = None, sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if not is_uneven(sizes):
            return original_reduce_scatter(full, group, sizes, use_global_buffer)
        total = full.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total.split(sizes)[torch.distributed.get_rank(group)].clone()

    original_gather = replace(module, "_gather_along_first_dim", gather)
    original_reduce_scatter = replace(module, "_reduce_scatter_along_first_dim", reduce_scatter)
