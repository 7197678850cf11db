"""Operators that Ascend has a fused kernel for: each one function, with its torch reference and its torch_npu call.

The device of the tensors chooses: npu takes the kernel, every other device the reference (cuda a Triton kernel where
`triton_kernels` has one). torch_npu is never imported here, since whoever has a tensor on an NPU has imported it. Meta
kernels of torch_npu, and some real ones, accept wrong shapes, so that each function checks what it is given. Where
torch_npu has no gradient of its own, an autograd function around forward and backward calls is here.

`leave_out` lets a run do without some of them, to find out which one a difference is from.

What is called where: `torch_modules` normalizes and attends by `rms_norm` and `packed_attention`, the experts use
`weighted_swiglu` and (on an NPU) `grouped_matmul`, with frozen weights `grouped_matmul_int8_weights` and
`grouped_matmul_int4`, `npu_adaptor` gives Megatron `rotary` and the two of the token dispatcher, `quant.noise` adds by
`add_noise`. `rollout.ascend` writes weights by `repack_int4` and `to_fractal_nz`, computes small int4 experts by
`decode_experts_int4`, and experts with adapters by `dynamic_quantize`, `routed_matmul_int8` and `routed_matmul`. The
others are what a forward of the trainer's own with int8 activations (it has none: that would bias log-probs) and a
router on an NPU are made of.
"""

from qerl_rl.platform.ops.activation import swiglu, weighted_swiglu, weighted_swiglu_backward
from qerl_rl.platform.ops.attention import packed_attention
from qerl_rl.platform.ops.checks import has_triton_ascend, on_npu
from qerl_rl.platform.ops.format_cast import to_fractal_nz
from qerl_rl.platform.ops.gating import gating_top_k_softmax
from qerl_rl.platform.ops.grouped_matmul import grouped_matmul
from qerl_rl.platform.ops.int4_experts import MOST_PAIRS, Int4Matrices, decode_experts_int4
from qerl_rl.platform.ops.noise import add_noise, normal_numbers
from qerl_rl.platform.ops.norm import rms_norm
from qerl_rl.platform.ops.permute import token_permute, token_unpermute
from qerl_rl.platform.ops.quantize import dynamic_quantize, pack_int4, unpack_int4
from qerl_rl.platform.ops.quantized_grouped_matmul import (
    grouped_matmul_int4,
    grouped_matmul_int8,
    grouped_matmul_int8_weights,
)
from qerl_rl.platform.ops.repack import repack_int4
from qerl_rl.platform.ops.rotary import rotary
from qerl_rl.platform.ops.routed_matmul import routed_matmul, routed_matmul_int8
from qerl_rl.platform.ops.selection import fused, leave_out

__all__ = [
    "MOST_PAIRS",
    "Int4Matrices",
    "add_noise",
    "decode_experts_int4",
    "dynamic_quantize",
    "fused",
    "gating_top_k_softmax",
    "grouped_matmul",
    "grouped_matmul_int4",
    "grouped_matmul_int8",
    "grouped_matmul_int8_weights",
    "has_triton_ascend",
    "leave_out",
    "normal_numbers",
    "on_npu",
    "pack_int4",
    "packed_attention",
    "repack_int4",
    "rms_norm",
    "rotary",
    "routed_matmul",
    "routed_matmul_int8",
    "swiglu",
    "to_fractal_nz",
    "token_permute",
    "token_unpermute",
    "unpack_int4",
    "weighted_swiglu",
    "weighted_swiglu_backward",
]
