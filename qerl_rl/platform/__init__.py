"""What differs between CPU, CUDA and Ascend: the device, and what Megatron-core needs to run on it."""

from qerl_rl.platform.adaptor import prepare_megatron
from qerl_rl.platform.device import Device, detect

__all__ = ["Device", "detect", "prepare_megatron"]
