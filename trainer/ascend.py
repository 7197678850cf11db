"""The rules of Ascend, held against a launch."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import psutil

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.config.mindspeed_checks import misplaced_fault
from qerl_rl.config.schema import Config
from qerl_rl.doctor.machine import shadowed
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.platform.ascend_rules import check_rules
from qerl_rl.platform.ascend_setting import Setting
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.modelslim import CACHE_C8, CACHE_KEY, ModelSlimFormats

_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_for_npu(config: Config) -> bool:
    """Whether the run is to be on Ascend; `auto` takes it where torch_npu is installed."""
    device = config.train.device
    return device == "npu" or (device == "auto" and importlib.util.find_spec("torch_npu") is not None)


def check_ascend(loaded: LoadedConfig, architecture: MoeArchitecture, has_weights: bool = True) -> None:
    """Raise ConfigError for the first rule of Ascend that the launch breaks; a launch on other devices breaks none.

    Args: has_weights: whether the model folder has weights, whose formats the rules ask for.
    """
    config = loaded.config
    if not is_for_npu(config):
        fault = misplaced_fault(config)
        if fault:
            key, problem, fix = fault
            raise ConfigError(problem, fix=fix, where=loaded.locate(key))
        return
    low, high = (int(port) for port in _EPHEMERAL_PORTS.read_text().split())
    setting = Setting(
        config,
        architecture,
        environment={**os.environ, **config.cluster.environment},
        linears=_linear_formats(config.model.path) if has_weights else frozenset(),
        has_cache_scales=_has_cache_scales(Path(config.model.path)),
        interfaces=tuple(psutil.net_if_addrs()),
        ephemeral_ports=(low, high),
        shadow=shadowed("vllm") or shadowed("vllm-ascend"),
    )
    check_rules(setting, loaded.locate)


def _linear_formats(folder: str) -> frozenset[str]:
    """What the projections outside routed experts are stored in."""
    with CheckpointReader(folder) as reader:
        names = [name for name in reader.weights() if ".experts." not in name and name.endswith("_proj.weight")]
        found = {reader.format_of(name) for name in names}
    return frozenset(format.name if format else "none" for format in found)


def _has_cache_scales(folder: Path) -> bool:
    """Whether the checkpoint describes an int8 KV cache."""
    path = folder / ModelSlimFormats.file_name
    return path.is_file() and json.loads(path.read_text()).get(CACHE_KEY) == CACHE_C8
