"""Make Megatron-core, which is written for CUDA, run on the device of this process."""

from __future__ import annotations

from qerl_rl.config.schema import Config
from qerl_rl.platform import cpu_adaptor, npu_adaptor
from qerl_rl.platform.device import Device

_prepared: list[str] = []


def prepare_megatron(device: Device, config: Config | None = None) -> None:
    """Apply the adaptor of `device`. Call it before anything imports megatron; a second call does nothing.

    CPU: the patches of `cpu_adaptor`. NPU: those of `npu_adaptor`, by the keys of `config` (train.mindspeed,
    model.provider and the layout; None: all defaults). CUDA needs none.
    Raises: PatchError when megatron is imported already, or lacks what a patch replaces; ConfigError when a package is
    missing; RuntimeError when the process was prepared for another device.
    """
    if device.name in _prepared:
        return
    if _prepared:
        raise RuntimeError(f"this process is prepared for {_prepared[0]}, so it can't run Megatron on {device.name}")
    if device.name == "cpu":
        cpu_adaptor.apply()
    elif device.name == "npu":
        npu_adaptor.apply(config or Config())
    _prepared.append(device.name)
