"""Turns this process into one that has simulated NPUs."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

from qerl_rl.platform.simulated_npu import package

NOT_PROVEN = (
    "simulated NPU (train.device=npu-sim): torch_npu is real, the card is this machine's CPU. Not proven by this run: "
    "numerics of the kernels, NZ formats, limits of kernels, speed."
)
STAND_INS = Path(__file__).with_name("stand_ins")
"""A folder with packages that stand in for what can't be installed here: MindSpeed."""
_started: list[bool] = []


def start() -> None:
    """Import torch_npu and give its operators kernels; a second call does nothing.

    Call it before anything asks torch whether there is a card. Raises: as `package.load`.
    """
    if _started:
        return
    # It misses CANN, which it prints.
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        package.load()
        # These name torch_npu's operators.
        from qerl_rl.platform.simulated_npu import collectives, kernels, operators

        kernels.install()
        kernels.install_kernels(operators.KERNELS)
        collectives.install()
    sys.path.append(str(STAND_INS))
    _started.append(True)
