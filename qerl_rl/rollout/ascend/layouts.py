"""What vllm-ascend keeps of a layer's weights, by scheme, as a function of what a checkpoint holds of them.

Each function says in a few lines what a `process_weights_after_loading` of vllm-ascend 0.23.0 leaves behind:
parameters, and plain attributes that its kernels read beside them. Sources: vllm_ascend/quantization/methods/
w8a8_dynamic.py, w4a16.py, w4a8.py, w8a8_mxfp8.py; vllm_ascend/ops/fused_moe/fused_moe.py; vllm_ascend/ops/linear.py.
Tests hold each against the real one.

Experts are [E, N, K] in a checkpoint's order (N outputs) and [E, K, N] in the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from qerl_rl.platform import ops
from qerl_rl.quant.modelslim_w4a8 import SIXTEENTHS, bias_of_rows, engine_scales

Tensors = Mapping[str, torch.Tensor]
Stored = dict[str, torch.Tensor]
EXPERT_WEIGHTS = ("w13", "w2")


class Layout(NamedTuple):
    """One scheme's way to keep weights.

    stored: (module, the tensors that a checkpoint holds of it, in their parameters' types) -> what is kept, by name;
    views where the order alone differs. nz: of these, what lies in FRACTAL_NZ also with weight_nz_mode 0, always or
    where experts are computed and exchanged in one kernel (fused MC2).
    """

    stored: Callable[[Any, Tensors], Stored]
    nz: tuple[str, ...] = ()
    nz_if_fused: tuple[str, ...] = ()


def _int8_linear(module: Any, tensors: Tensors) -> Stored:
    """weight [N, K], weight_scale [N, 1]. The scale also as float32, which fused kernels read."""
    scale = tensors["weight_scale"].flatten()
    return {"weight": tensors["weight"].t(), "weight_scale": scale, "weight_scale_fp32": scale.float()}


def _int8_experts(module: Any, tensors: Tensors) -> Stored:
    stored: Stored = {}
    for name, fused in zip(EXPERT_WEIGHTS, ("fused_w1_scale", "fused_w2_scale"), strict=True):
        scale = tensors[f"{name}_weight_scale"].flatten(1)
        stored |= {f"{name}_weight": tensors[f"{name}_weight"].transpose(1, 2), f"{name}_weight_scale": scale}
        if hasattr(module, fused):
            # What fused MC2 reads: the bits of each float32 in an int64, all experts in a row.
            stored[fused] = scale.float().flatten().view(torch.int32).long()
    return stored | {"w13_weight_scale_fp32": stored["w13_weight_scale"].float()}


def _int4_experts(module: Any, tensors: Tensors) -> Stored:
    """Eight neighbours of a row in an int32, each plus 8; kept are eight neighbours of a column, signed."""
    stored: Stored = {}
    for name in EXPERT_WEIGHTS:
        stored[f"{name}_weight_packed"] = ops.repack_int4(tensors[f"{name}_weight_packed"])
        stored[f"{name}_weight_scale"] = tensors[f"{name}_weight_scale"].transpose(1, 2)
    return stored


def _int4_experts_with_int8_tokens(module: Any, tensors: Tensors) -> Stored:
    """An int4 in each int8; kept are eight neighbours of a column in an int32, the first in the lowest bits.

    The kernel multiplies tokens with weights made unsigned, and is handed what to add for it: 8 times the sum of each
    column. Scales are the bits of float32 in an int64.
    """
    stored: Stored = {}
    scheme = module.quant_method.quant_method
    for name in EXPERT_WEIGHTS:
        weight, scale = tensors[f"{name}_weight"], tensors[f"{name}_weight_scale"].transpose(1, 2)
        columns = weight.transpose(1, 2).contiguous()
        kept = scale.float() if scheme.is_per_channel_weight or not _is_msmodelslims(scheme) else engine_scales(scale)
        bits = kept.contiguous().view(torch.int32).long() & 0xFFFFFFFF
        # Without groups, w13's has no dimension for them; w2's product wants one.
        stored[f"{name}_weight_scale"] = bits[:, 0] if name == "w13" and scheme.is_per_channel_weight else bits
        if _is_msmodelslims(scheme):
            parts = {"": weight, "_scale": tensors[f"{name}_weight_scale"]}
            pieces = SIXTEENTHS // scheme.tp_size if name == "w2" else 1
            stored[f"{name}_scale_bias"] = bias_of_rows(parts, pieces).transpose(1, 2).contiguous().sum(1)
        else:
            groups = columns.float().unflatten(1, (scale.shape[1], -1)) * scale.contiguous()[:, :, None]
            stored[f"{name}_scale_bias"] = 8 * groups.flatten(1, 2).sum(1)
        stored[f"{name}_weight"] = _eight_in_an_int32(columns)
    return stored


def _is_msmodelslims(scheme: Any) -> bool:
    """Whether the weights came in msmodelslim's layout, whose biases are summed by parts of a row."""
    return scheme.quant_method != "compressed-tensors"


def _eight_in_an_int32(values: torch.Tensor) -> torch.Tensor:
    """int8 [..., N] between -8 and 7 -> int32 [..., N / 8], by views of bytes: the kernel takes them as they lie."""
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return ((low & 15) | (high << 4)).contiguous().view(torch.int32)


def _mxfp8_linear(module: Any, tensors: Tensors) -> Stored:
    """Scales of two neighbouring groups lie together: [N, G] -> [G / 2, N, 2]; an odd one has a zero beside it."""
    scale = tensors["weight_scale"]
    if scale.shape[1] % 2:
        scale = torch.nn.functional.pad(scale, (0, 1))
    return {"weight": tensors["weight"].t(), "weight_scale": scale.unflatten(1, (-1, 2)).transpose(0, 1)}


def _mxfp8_experts(module: Any, tensors: Tensors) -> Stored:
    stored: Stored = {}
    for name in EXPERT_WEIGHTS:
        stored[f"{name}_weight"] = tensors[f"{name}_weight"].transpose(1, 2)
        stored[f"{name}_weight_scale"] = tensors[f"{name}_weight_scale"].unflatten(2, (-1, 2)).transpose(1, 2)
    return stored


def _float_linear(module: Any, tensors: Tensors) -> Stored:
    stored = {"weight": tensors["weight"]}
    if hasattr(module, "weight_fp32"):
        stored["weight_fp32"] = tensors["weight"].float()
    return stored


def _float_experts(module: Any, tensors: Tensors) -> Stored:
    return {f"{name}_weight": tensors[f"{name}_weight"].transpose(1, 2) for name in EXPERT_WEIGHTS}


LAYOUTS: dict[str, Layout] = {
    "AscendW8A8DynamicLinearMethod": Layout(_int8_linear),
    # npu_grouped_matmul_swiglu_quant takes nothing else.
    "AscendW8A8DynamicFusedMoEMethod": Layout(_int8_experts, ("w13_weight", "w2_weight")),
    "AscendW4A16FusedMoEMethod": Layout(_int4_experts),
    "AscendW4A8DynamicFusedMoEMethod": Layout(_int4_experts_with_int8_tokens),
    "AscendW8A8MXFP8DynamicLinearMethod": Layout(_mxfp8_linear),
    "AscendW8A8MXFP8DynamicFusedMoEMethod": Layout(_mxfp8_experts),
    "AscendUnquantizedLinearMethod": Layout(_float_linear),
    # What vllm-ascend leaves to vLLM: linear layers that a quantized checkpoint does not quantize.
    "UnquantizedLinearMethod": Layout(_float_linear),
    "AscendUnquantizedFusedMoEMethod": Layout(_float_experts, nz_if_fused=("w13_weight", "w2_weight")),
}
"""By the class that keeps a layer's weights."""

WRITTEN = frozenset(
    [
        *("weight", "bias", "weight_fp32", "weight_scale", "weight_scale_fp32", "fused_w1_scale", "fused_w2_scale"),
        *(f"{name}_{part}" for name in EXPERT_WEIGHTS for part in ("weight", "weight_packed", "weight_scale")),
        *("w13_weight_scale_fp32", "w13_scale_bias", "w2_scale_bias"),
    ]
)
"""All names in what the layouts store, and of what is written as it is."""
