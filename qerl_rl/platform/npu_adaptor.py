"""Run Megatron-core on Ascend: torch_npu's and MindSpeed's adaptors, and what this project adds to them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from qerl_rl.platform.cpu_adaptor import empty_fp8_shards, existing, replace
from qerl_rl.platform.ops import rotary


def apply() -> None:
    """Apply everything; see `prepare_megatron`. Raises: PatchError when Megatron lacks what a patch replaces."""
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    importlib.import_module("mindspeed.megatron_adaptor")
    device_capability()
    # There is no Transformer Engine on an NPU either.
    empty_fp8_shards()
    fused_rotary()


def device_capability() -> None:
    """torch's broadcast compares the capability of CUDA cards, and an NPU has none (None): a TypeError."""
    original = existing(torch.cuda, "get_device_capability")
    replace(torch.cuda, "get_device_capability", lambda device=None: original(device) or (0, 0))


def fused_rotary() -> None:
    """Megatron's own rotary embedding is seven kernels for each sequence and layer, and keeps what they make."""
    module = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    name = "_apply_rotary_pos_emb_bshd"

    def apply_rotary(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Any:
        whole = t.dim() == 4 and freqs.shape[-1] == t.shape[-1]
        if rotary_interleaved or multi_latent_attention or not whole:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        return rotary(t, (torch.cos(freqs) * mscale).to(t.dtype), (torch.sin(freqs) * mscale).to(t.dtype))

    original = replace(module, name, apply_rotary)
