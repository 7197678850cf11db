"""The profilers of the devices, each as a context around what it records."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.profiler_schema import ProfilerConfig
from qerl_rl.platform.device import Device

LEVELS = {"none": "Level_none", "level0": "Level0", "level1": "Level1", "level2": "Level2"}
"""profiler.level -> its name in torch_npu.profiler.ProfilerLevel."""
AIC_METRICS = {
    "none": "AiCoreNone",
    "pipe_utilization": "PipeUtilization",
    "arithmetic_utilization": "ArithmeticUtilization",
    "memory": "Memory",
    "memory_l0": "MemoryL0",
    "memory_ub": "MemoryUB",
    "resource_conflict_ratio": "ResourceConflictRatio",
    "l2_cache": "L2Cache",
    "memory_access": "MemoryAccess",
}
"""profiler.aic_metrics -> its name in torch_npu.profiler.AiCMetrics."""
EXPORTS = {"text": "Text", "db": "Db"}
"""profiler.export -> its name in torch_npu.profiler.ExportType."""
_HAVE_COUNTERS = ("level1", "level2")


@contextmanager
def profiled(device: Device, profiler: ProfilerConfig, folder: Path, name: str, label: str) -> Iterator[None]:
    """Record what runs inside, as an event `label`.

    kind torch writes folder/NAME.json, a Chrome trace of the host and of the device; kind msprof a folder
    folder/NAME_..._ascend_pt, as torch_npu names them.
    Raises: ConfigError for msprof on another device than an NPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if profiler.kind == "torch":
        # On an NPU transfer_to_npu has put torch_npu's in place of these.
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.name != "cpu":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profile: Any = torch.profiler.profile(activities=activities, **_options(profiler))
    else:
        profile = _msprof(device, profiler, folder, name)
    with profile:
        with torch.profiler.record_function(label):
            yield
        # Else what the device has not yet done is missing.
        device.synchronize()
    if profiler.kind == "torch":
        profile.export_chrome_trace(str(folder / f"{name}.json"))


def _options(profiler: ProfilerConfig) -> dict[str, bool]:
    return {
        "record_shapes": profiler.shapes,
        "profile_memory": profiler.memory,
        "with_stack": profiler.stacks,
    }


def _msprof(device: Device, profiler: ProfilerConfig, folder: Path, name: str) -> Any:
    if device.name != "npu":
        raise ConfigError(
            f"profiler.kind=msprof profiles NPUs, and this process computes on {device.name}.",
            fix="set profiler.kind to torch",
        )
    npu = importlib.import_module("torch_npu.profiler")
    counters = profiler.aic_metrics if profiler.level in _HAVE_COUNTERS else "none"
    return npu.profile(
        activities=[npu.ProfilerActivity.CPU, npu.ProfilerActivity.NPU],
        on_trace_ready=npu.tensorboard_trace_handler(
            dir_name=str(folder), worker_name=name, analyse_flag=profiler.analyse
        ),
        experimental_config=npu._ExperimentalConfig(
            profiler_level=getattr(npu.ProfilerLevel, LEVELS[profiler.level]),
            aic_metrics=getattr(npu.AiCMetrics, AIC_METRICS[counters]),
            export_type=[getattr(npu.ExportType, EXPORTS[profiler.export])],
        ),
        **_options(profiler),
    )
