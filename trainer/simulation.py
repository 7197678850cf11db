"""A launch with `train.device: npu-sim`: said first, and made ready before a process starts."""

from __future__ import annotations

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.platform.simulated_npu import NOT_PROVEN, package


def prepare_simulation(loaded: LoadedConfig, *, dry_run: bool) -> None:
    """Say what a run on simulated NPUs does not prove, and fetch what it needs; a dry run fetches nothing.

    Raises: ConfigError where the simulation can't run on this machine.
    """
    if loaded.config.train.device != "npu-sim":
        return
    print(NOT_PROVEN, flush=True)
    if dry_run:
        return
    if not package.is_prepared():
        print(f"torch-npu {package.VERSION} is downloaded and stubs of CANN are compiled into {package.CACHE}: once")
    try:
        package.prepare()
    except ConfigError as error:
        raise ConfigError(error.problem, fix=error.fix, where=loaded.locate("train.device")) from None
