"""Functions on ranks of simulated NPUs, as `tests.ranks` runs them on CPUs."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from tests.platform.npu import package
from tests.ranks import run_ranks


def run_simulated_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank; there, torch_npu is imported and its kernels are simulated.

    Megatron can be imported, too: transfer_to_npu is torch_npu's own. In place of MindSpeed, which is not on PyPI,
    stands what Megatron needs to be imported, from this project's adaptor for the CPU.
    """
    with patch.dict(os.environ, package.environment()):
        return run_ranks(_simulated, world_size, str(package.installed() / "site"), function, *args)


def _simulated(site: str, function: Callable[..., Any], *args: Any) -> Any:
    warnings.filterwarnings("ignore")
    # A spawned process has the path of its parent.
    sys.path.append(site)
    importlib.import_module("torch_npu")
    from qerl_rl.platform import cpu_adaptor
    from tests.npu_sim import device, operators

    device.install()
    device.install_kernels(operators.KERNELS)
    device.install_collectives()
    sys.modules["mindspeed"] = types.ModuleType("mindspeed")
    sys.modules["mindspeed.megatron_adaptor"] = types.ModuleType("mindspeed.megatron_adaptor")
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    with cpu_adaptor.compilation_off():
        importlib.import_module("megatron.core")
    return function(*args)
