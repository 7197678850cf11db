"""A layer of a live vllm-ascend engine gets other weights, in the memory that it has.

Captured graphs hold addresses, so nothing is replaced: each tensor that the kernels read is written over, derived ones
too. vLLM's layerwise reload, which does this on other platforms, leaves plain attributes (float32 twins of scales) as
they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qerl_rl.platform import ops
from qerl_rl.rollout.ascend.layouts import LAYOUTS, Layout


def is_ascend(module: Any) -> bool:
    """Whether vllm-ascend keeps this layer's weights."""
    method = getattr(module, "quant_method", None)
    if type(method).__module__.partition(".")[0] == "vllm_ascend":
        return True
    weight = getattr(module, "weight", None)
    return method is not None and isinstance(weight, torch.Tensor) and weight.device.type == "npu"


@torch.no_grad()
def rewrite(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give `module` these weights: by the names, shapes and types of its parameters before they were processed.

    Raises: RuntimeError when they are kept in a way that is not known here; the layer is as it was then.
    """
    layout = layout_of(module)
    device = next(module.parameters()).device
    here = {name: tensor.to(device) for name, tensor in tensors.items()}
    stored = layout.stored(module, here)
    if "bias" in here:
        stored["bias"] = here["bias"]
    kept = {name: getattr(module, name) for name in stored if hasattr(module, name)}
    wrong = [name for name, tensor in stored.items() if name not in kept or kept[name].shape != tensor.shape]
    if wrong:
        raise RuntimeError(
            f"{scheme_name(module)} keeps {', '.join(wrong)} otherwise than vllm-ascend 0.23.0: install that version, "
            "or bring qerl_rl/rollout/ascend/layouts.py up to date"
        )
    nz = _in_nz(layout)
    for name, tensor in stored.items():
        # A matrix in FRACTAL_NZ can't be written element by element: it is cast beside it, and copied whole.
        kept[name].copy_(ops.to_fractal_nz(tensor.contiguous()) if name in nz else tensor)


def _in_nz(layout: Layout) -> tuple[str, ...]:
    """What of a layer lies in FRACTAL_NZ. Raises: RuntimeError where weight_nz_mode adds to it."""
    from vllm_ascend.ascend_config import get_ascend_config

    config = get_ascend_config()
    if config.weight_nz_mode:
        raise RuntimeError(
            f"weights can't be replaced with weight_nz_mode {config.weight_nz_mode}: set "
            "rollout.ascend.weight_nz_mode to 0"
        )
    return layout.nz + (layout.nz_if_fused if config.enable_fused_mc2 else ())


def refresh_attention(module: Any, vllm_config: Any) -> None:
    """Let latent attention derive its matrices anew from a kv_b_proj that was written; other layers have none."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        attention: Any = getattr(layer, "impl", None)
        if getattr(attention, "kv_b_proj", None) is module:
            attention.process_weights_after_loading(vllm_config.model_config.dtype)


def layout_of(module: Any) -> Layout:
    """How this layer's weights are kept. Raises: RuntimeError where that is not known, or they move between ranks."""
    scheme = scheme_name(module)
    if scheme not in LAYOUTS:
        raise RuntimeError(
            f"weights that {scheme} of vllm-ascend keeps can't be replaced in a running engine: set quant.format to "
            "w8a8, w4a16, w4a8 or none (on Ascend 950 also mxfp8)"
        )
    if hasattr(module, "w13_weight_list") or hasattr(module, "weight_1"):
        raise RuntimeError(
            f"{scheme} has split its weights, of an engine whose weights or adapters change: set "
            "rollout.ascend.dynamic_eplb to false"
        )
    return LAYOUTS[scheme]


def scheme_name(module: Any) -> str:
    """The class that keeps the weights: vllm-ascend's quantized methods only hand on to theirs."""
    method = module.quant_method
    return type(getattr(method, "quant_method", method)).__name__
