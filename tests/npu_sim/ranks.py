"""Functions on ranks of simulated NPUs, as `tests.ranks` runs them on CPUs."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.platform.npu import package
from tests.ranks import run_ranks

STAND_INS = str(Path(__file__).parents[1] / "platform" / "stand_ins")


def run_simulated_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank; there, torch_npu is imported and its kernels are simulated.

    Megatron can be prepared there, too: transfer_to_npu is torch_npu's own, MindSpeed a package that changes nothing.
    """
    with patch.dict(os.environ, package.environment()):
        return run_ranks(_simulated, world_size, str(package.installed() / "site"), function, *args)


def _simulated(site: str, function: Callable[..., Any], *args: Any) -> Any:
    warnings.filterwarnings("ignore")
    # A spawned process has the path of its parent.
    sys.path.append(site)
    importlib.import_module("torch_npu")
    from tests.npu_sim import device, operators

    device.install()
    device.install_kernels(operators.KERNELS)
    device.install_collectives()
    sys.path.append(STAND_INS)
    return function(*args)
