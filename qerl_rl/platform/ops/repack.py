"""int4 weights from the order in which checkpoints keep them to the one in which kernels read them."""

from __future__ import annotations

import torch

from qerl_rl.platform.ops.checks import has_triton, require
from qerl_rl.platform.ops.quantize import INT4_IN_INT32, pack_int4, unpack_int4

SIGNS = -0x77777778
"""0x88888888 as an int32. A code that is 8 too large with its highest bit turned round is its two's complement."""


def repack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The same int4 matrices, transposed and packed along their other dimension.

    Source: int32 [E, N, K / 8], each eight neighbours of a row (k, k + 1, ...) of W [N, K], the first in the lowest
    bits, each plus 8: compressed-tensors' pack-quantized, which checkpoints and the trainer keep (`quant.int4.W4A16`).
    Target: int32 [E, K, N / 8], each eight neighbours of a row of W^T (n, n + 1, ...), the first in the lowest bits, in
    two's complement: what `pack_int4` gives, `grouped_matmul_int4` and `decode_experts_int4` read, and vllm-ascend's
    W4A16 experts hold after loading.
    On CUDA, and on an NPU where triton-ascend is installed, by a Triton kernel in one pass over 4 bits a weight;
    elsewhere an expert at a time by way of integers.
    Raises: ValueError for another type, or where N is no multiple of 8.
    """
    fits = packed.dim() == 3 and packed.dtype == torch.int32 and packed.shape[1] % INT4_IN_INT32 == 0
    require(fits, "repack_int4", "int32 [E, N, K / 8] with N a multiple of 8", packed=packed)
    if has_triton(packed):
        from qerl_rl.platform.triton_kernels import int4

        return int4.repack_int4(packed)
    experts, outputs, words = packed.shape
    repacked = packed.new_empty(experts, words * INT4_IN_INT32, outputs // INT4_IN_INT32)
    for source, target in zip(packed, repacked, strict=True):
        target.copy_(pack_int4(unpack_int4(source ^ SIGNS).t().int()))
    return repacked
