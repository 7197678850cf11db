"""An Ascend NPU without a card, for `train.device: npu-sim`.

torch_npu is the real one, with its device, allocator, autograd and transfer_to_npu; CANN below it is a stub whose
device memory is the host's (acl.c). Kernels and collectives run on the CPU, on views of that memory.
"""

from qerl_rl.platform.simulated_npu.start import NOT_PROVEN, start

__all__ = ["NOT_PROVEN", "start"]
