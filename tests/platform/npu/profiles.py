"""Stages profiled on an NPU by the real torch_npu; run as a program, prints one line of JSON."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.profiler_schema import ProfilerConfig
from qerl_rl.platform import profilers
from qerl_rl.platform.device import NPU
from qerl_rl.platform.simulated_npu import package

ASKED = {
    "as by default": ProfilerConfig(kind="msprof"),
    "everything": ProfilerConfig(
        kind="msprof", memory=True, shapes=True, stacks=True, level="level2", aic_metrics="memory_ub", export="db"
    ),
    "kernels only": ProfilerConfig(kind="msprof", level="level0", analyse=False),
}


def _recorded(profiler: ProfilerConfig) -> dict[str, Any]:
    """What torch_npu notes beside the data, for MindStudio: how it was asked for; and the folder's name."""
    with tempfile.TemporaryDirectory() as folder:
        with profilers.profiled(NPU, profiler, Path(folder), "step_1_update_rank_0", "update of step 1"):
            torch.ones(2) + 1
        [made] = Path(folder).iterdir()
        return {"folder": made.name, **json.loads((made / "profiler_info.json").read_text())["config"]}


def _settings() -> list[list[str]]:
    """What each value of the keys becomes."""
    found = []
    for level, counters, export in itertools.product(profilers.LEVELS, profilers.AIC_METRICS, profilers.EXPORTS):
        profiler = ProfilerConfig(kind="msprof", level=level, aic_metrics=counters, export=export)
        with tempfile.TemporaryDirectory() as folder:
            options = profilers._msprof(NPU, profiler, Path(folder), "name").prof_if.experimental_config
        found.append([options._profiler_level, options._aic_metrics, *options.export_type])
    return found


def _as_chrome_trace() -> list[list[str]]:
    """The activities of each profile that kind torch makes once transfer_to_npu has replaced what torch.profiler is."""
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    profile: Any = importlib.import_module("torch_npu.profiler").profile
    made: list[list[str]] = []
    original = profile.__init__

    def noted(self: Any, **options: Any) -> None:
        original(self, **options)
        made.append(sorted(str(activity) for activity in options["activities"]))

    profile.__init__ = noted
    with profilers.profiled(NPU, ProfilerConfig(), Path("profile"), "name", "update of step 1"):
        torch.ones(2) + 1
    return made


def main() -> None:
    warnings.filterwarnings("ignore")
    package.load()
    module = importlib.import_module("torch_npu.profiler")
    known = [module.supported_profiler_level(), module.supported_ai_core_metrics(), module.supported_export_type()]
    with tempfile.TemporaryDirectory() as folder:
        # A profile that records nothing, for want of a driver, leaves its notes in the working folder.
        os.chdir(folder)
        found = {
            "settings": _settings(),
            "known": [sorted(values) for values in known],
            "recorded": {name: _recorded(profiler) for name, profiler in ASKED.items()},
            "torch": _as_chrome_trace(),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
