"""The device a worker process computes on, described once so that nothing else asks which one it is."""

from __future__ import annotations

import importlib
import importlib.util
import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import psutil
import torch

from qerl_rl.config.errors import ConfigError

_POLL_SECONDS = 50e-6


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes of device memory: held by this process now, and at most since it started."""

    used_bytes: int
    peak_bytes: int


class Pending(Protocol):
    """Something under way (a Future is one)."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> Any:
        """Wait until it has ended. Raises: what went wrong."""


class CopyStream:
    """Copies beside what the device computes, one after the other; `runtime` is torch's module of the device.

    A CPU (runtime None) has nothing that copies beside it: there a copy is done at once.
    """

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self._stream: Any = None if runtime is None else runtime.Stream()

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Pending:
        """Begin to copy each (target, source), after all that the device was given so far. Both must live till then."""
        if self._runtime is None:
            for target, source in pairs:
                target.copy_(source)
            return _Done()
        self._stream.wait_stream(self._runtime.current_stream())
        with self._runtime.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            event = self._runtime.Event()
            event.record(self._stream)
        return _UntilEvent(event)


class _Done:
    def done(self) -> bool:
        return True

    def result(self) -> None:
        pass


@dataclass(frozen=True)
class _UntilEvent:
    event: Any

    def done(self) -> bool:
        return bool(self.event.query())

    def result(self) -> None:
        self.event.synchronize()


@dataclass(frozen=True)
class Device:
    """One kind of device. `name` is also torch's device type.

    collective_backend is the torch.distributed backend; visible_devices_variable the environment variable that limits a
    process to some cards (empty where there are no cards). is_simulated: its memory and kernels are the host's.
    """

    name: str
    collective_backend: str
    visible_devices_variable: str
    is_simulated: bool = False

    def current(self) -> torch.device:
        """The torch.device of this process."""
        if self.name == "cpu":
            return torch.device("cpu")
        return torch.device(self.name, self._runtime().current_device())

    def select(self, local_rank: int) -> None:
        """Make card `local_rank` the current one of this process; there is nothing to choose on a CPU."""
        if self.name != "cpu":
            self._runtime().set_device(local_rank)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.name != "cpu":
            self._runtime().synchronize()

    def copy_stream(self) -> CopyStream:
        """A new stream for copies."""
        return CopyStream(None if self.name == "cpu" else self._runtime())

    def pinned(self, count: int) -> torch.Tensor:
        """uint8 [count] of host memory that the device can copy to and from by itself."""
        return torch.empty(count, dtype=torch.uint8, device="cpu", pin_memory=self.name != "cpu")

    @property
    def shares_host_memory(self) -> bool:
        """Whether its tensors lie in memory of the host, which the processes of a machine can share."""
        return self.name == "cpu"

    def wait(self, work: torch.distributed.Work, timeout_s: float) -> None:
        """Wait for a collective that was started with async_op.

        Raises: TimeoutError, or the RuntimeError of the backend, when it fails or takes longer than `timeout_s`.
        """
        if self.name == "cpu":
            work.wait(timedelta(seconds=timeout_s))
            return
        # There `wait` only queues: the stream waits, not the process, and nobody would see the deadline pass.
        deadline = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing in {timeout_s} s")
            time.sleep(_POLL_SECONDS)
        work.wait()

    def memory(self) -> MemoryStatistics:
        """Memory of this process on the device; on a CPU its resident set, which other libraries share."""
        if self.name == "cpu":
            # Linux counts ru_maxrss in KiB.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return MemoryStatistics(psutil.Process().memory_info().rss, peak)
        runtime = self._runtime()
        return MemoryStatistics(runtime.memory_allocated(), runtime.max_memory_allocated())

    def is_available(self) -> bool:
        """Whether this process can compute on it."""
        if self.name == "cpu":
            return True
        if self.is_simulated:
            _start_simulation()
        elif self.name == "npu" and not _import_torch_npu():
            return False
        return bool(self._runtime().is_available())

    def _runtime(self) -> Any:
        # torch.npu exists only once torch_npu is imported, so a plain attribute would be wrong for the other devices.
        return getattr(torch, self.name)


CPU = Device("cpu", "gloo", "")
CUDA = Device("cuda", "nccl", "CUDA_VISIBLE_DEVICES")
NPU = Device("npu", "hccl", "ASCEND_RT_VISIBLE_DEVICES")
DEVICES = {device.name: device for device in (NPU, CUDA, CPU)}
SIMULATED = {"npu-sim": replace(NPU, is_simulated=True)}
"""Devices that a launch file must name: nothing detects them."""


def _import_torch_npu() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    importlib.import_module("torch_npu")
    return True


def _start_simulation() -> None:
    # It changes torch for good, and needs a compiler: only for those who ask for it.
    importlib.import_module("qerl_rl.platform.simulated_npu").start()


def detect(device: str = "auto") -> Device:
    """The device named by `train.device`; `auto` takes the first there is of npu, cuda and cpu.

    npu-sim turns this process into one with simulated NPUs, for good (`qerl_rl.platform.simulated_npu`).
    Raises: ConfigError when the name is unknown, or this machine has no such device or can't simulate it.
    """
    if device == "auto":
        return next(candidate for candidate in DEVICES.values() if candidate.is_available())
    known = DEVICES | SIMULATED
    if device not in known:
        raise ConfigError(
            f"train.device={device} is unknown.", fix="set train.device to auto, cpu, cuda, npu or npu-sim"
        )
    if not known[device].is_available():
        raise ConfigError(
            f"train.device={device}, but torch finds no such device here.",
            fix="set train.device to auto, or install the torch build and driver of the device",
        )
    return known[device]
