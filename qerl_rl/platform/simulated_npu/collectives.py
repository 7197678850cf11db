"""HCCL on the simulated NPU: collectives of its tensors run in gloo, on views of their memory.

A group of the backend `hccl` takes tensors of the device only, as on a card: collectives of CPU tensors raise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qerl_rl.platform.simulated_npu import kernels

_hosts: dict[str, Any] = {}
"""By name of an hccl group: the same ranks as a group of CPUs."""
_backends: dict[str, SimulatedHccl] = {}
"""Python parts of what torch holds; without a reference from here they would vanish from under it."""


class SimulatedHccl(dist.ProcessGroupGloo):
    """What a group of the backend hccl has for its NPU tensors."""

    def batch_isend_irecv(self, names: Sequence[str], tensors: Sequence[torch.Tensor], peers: Sequence[int]) -> _Batch:
        """The call that torch_npu gives a whole batch to: one work for all."""
        views = [kernels.host_view(tensor) for tensor in tensors]
        start = {"isend": self.send, "irecv": self.recv}
        # gloo matches messages of two ranks by their order within one tag.
        works = [start[name]([view], peer, 0) for name, view, peer in zip(names, views, peers, strict=True)]
        return _Batch(works, views)


class _Batch:
    """The works of a batch, as one. It keeps the views: gloo has no more than their addresses."""

    def __init__(self, works: Sequence[Any], views: Sequence[torch.Tensor]) -> None:
        self._works, self._views = list(works), views

    def wait(self, timeout: timedelta | None = None) -> bool:
        while self._works:
            # A second wait for the same one would wait for the next message.
            work = self._works.pop(0)
            work.wait() if timeout is None else work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """True, after it has waited: gloo finds out about messages by waiting for them only."""
        return self.wait()


def install() -> None:
    """Let torch.distributed make groups of `hccl`, and their collectives run in gloo."""
    plugin = dist.Backend._plugins["HCCL"]
    dist.Backend._plugins["HCCL"] = plugin._replace(creator_fn=_make_group)
    library = torch.library.Library("c10d", "IMPL")
    kernels.kept.append(library)
    for name, operator in kernels.registered("PrivateUse1", "c10d"):
        library.impl(name, kernels.kernel(_on_host_group(operator)), "PrivateUse1", allow_override=True)


def _make_group(options: Any, _: Any) -> SimulatedHccl:
    rank, size = options.group_rank, options.group_size
    backend = SimulatedHccl(options.store, rank, size, options.timeout)
    host = dist.ProcessGroup(options.store, rank, size)
    host._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    host._register_backend(kernels.HOST, dist.ProcessGroup.BackendType.GLOO, backend)
    _hosts[options.group_id], _backends[options.group_id] = host, backend
    return backend


def _on_host_group(operator: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(operator)
    def run(*arguments: Any, **options: Any) -> Any:
        found = [
            _host_group(argument) if isinstance(argument, torch.ScriptObject) else argument for argument in arguments
        ]
        return operator(*found, **options)

    return run


def _host_group(value: Any) -> Any:
    """The group of CPUs in place of one of NPUs; any other argument as it is."""
    if not isinstance(value, torch.ScriptObject) or not value._type().qualified_name().endswith("ProcessGroup"):
        return value
    return _hosts[dist.ProcessGroup.unbox(value).group_name].boxed()
