"""Imported where MindSpeed's adaptor would be, after transfer_to_npu; importing it does what that does for Megatron."""

import importlib
from typing import Any

import torch

from qerl_rl.platform.cpu_adaptor import compilation_off, empty_fp8_shards, replace


def tensor_type_names() -> None:
    """Megatron's optimizers know parameters by the string "torch.cuda.FloatTensor", and raise at "torch.npu."."""

    def type_name(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        return result.replace("torch.npu.", "torch.cuda.") if isinstance(result, str) else result

    original = replace(torch.Tensor, "type", type_name)


tensor_type_names()
with compilation_off():
    # Megatron binds torch.compile when it is imported; there is no compiler for this device.
    importlib.import_module("megatron.core")
# There is no Transformer Engine on an NPU; MindSpeed replaces what would need it.
empty_fp8_shards()
