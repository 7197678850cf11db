"""The experts of a few tokens, with int4 weights: what a decode step asks for."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qerl_rl.platform.ops.checks import has_triton, require
from qerl_rl.platform.ops.quantize import INT4_IN_INT32, unpack_int4

MOST_PAIRS = 64
"""Of a token with an expert: 8 tokens of 8 experts. With more of them experts are shared, and a product that reads each
once is faster."""
LEAST_GROUP = 8


class Int4Matrices(NamedTuple):
    """W[e] = (int4 + offset) * scale of E experts, as `repack_int4` leaves them.

    packed: int32 [E, K, N / 8]; scale and offset (None: zeros): floats [E, K / s, N], one for s neighbours along K, a
    multiple of 8 or all.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None


def decode_experts_int4(
    x: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor, gate_up: Int4Matrices, down: Int4Matrices
) -> torch.Tensor:
    """y[t] = sum over j of p[t, j] * W2[e]^T (silu(gate) * up), with (gate, up) = W13[e]^T x[t] and e = chosen[t, j].

    Args: x float [T, H]; chosen int [T, k], -1 where the expert is elsewhere, which adds nothing; probabilities float
    [T, k]; T * k <= 64; gate_up of K = H, N = 2I (gate, then up); down of K = I, N = H.
    Returns: [T, H] in the type of x; in between all is float32. No gradient. Experts that nobody chose are not read.
    Raises: ValueError when shapes or types do not fit.
    A Triton kernel on CUDA, and on an NPU where triton-ascend is installed; torch_npu has gate, up, SwiGLU and down as
    three launches (`grouped_matmul_int4` twice, `npu_swiglu`), made for many rows an expert.
    """
    _check(x, chosen, probabilities, gate_up, down)
    if has_triton(x):
        from qerl_rl.platform.triton_kernels import int4

        return int4.decode_experts_int4(x.detach(), chosen, probabilities.detach(), tuple(gate_up), tuple(down))
    outputs = torch.zeros_like(x, dtype=torch.float32)
    for token, (experts, weights) in enumerate(zip(chosen.tolist(), probabilities.detach().float(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            if expert >= 0:
                gate, up = (x[token].detach().float() @ _floats(gate_up, expert)).chunk(2)
                outputs[token] += (F.silu(gate) * up * weight) @ _floats(down, expert)
    return outputs.to(x.dtype)


def _floats(matrices: Int4Matrices, expert: int) -> torch.Tensor:
    """float32 [K, N] of one expert."""
    scale = matrices.scale[expert].float()
    values = unpack_int4(matrices.packed[expert]).float().unflatten(0, (len(scale), -1))
    if matrices.offset is not None:
        values = values + matrices.offset[expert].float()[:, None]
    return (values * scale[:, None]).flatten(0, 1)


def _check(
    x: torch.Tensor, chosen: torch.Tensor, probabilities: torch.Tensor, gate_up: Int4Matrices, down: Int4Matrices
) -> None:
    operator, given = "decode_experts_int4", {"x": x, "chosen": chosen, "probabilities": probabilities}
    fits = x.dim() == chosen.dim() == 2 and chosen.shape == probabilities.shape and len(x) == len(chosen)
    fits = fits and x.is_floating_point() and probabilities.is_floating_point() and not chosen.is_floating_point()
    require(fits, operator, "floats x [T, H], integers chosen [T, k] and floats probabilities [T, k]", **given)
    require(chosen.numel() <= MOST_PAIRS, operator, f"at most {MOST_PAIRS} pairs of token and expert", **given)
    for name, matrices in (("gate_up", gate_up), ("down", down)):
        shapes = {f"{name}.{part}": tensor for part, tensor in matrices._asdict().items() if tensor is not None}
        packed, scale = matrices.packed, matrices.scale
        fits = packed.dim() == scale.dim() == 3 and packed.dtype == torch.int32 and scale.is_floating_point()
        fits = fits and (len(scale), scale.shape[2]) == (len(packed), packed.shape[2] * INT4_IN_INT32)
        fits = fits and scale.shape[1] > 0 and packed.shape[1] % scale.shape[1] == 0
        fits = fits and (scale.shape[1] == 1 or packed.shape[1] // scale.shape[1] % LEAST_GROUP == 0)
        fits = fits and (matrices.offset is None or matrices.offset.shape == scale.shape)
        needed = "int32 packed [E, K, N / 8], floats scale (and offset) [E, K / s, N] with s a multiple of 8 or K"
        require(fits, operator, needed, **shapes)
    hidden, width = x.shape[1], down.packed.shape[1]
    fits = gate_up.packed.shape == (len(down.packed), hidden, width // 4) and width % INT4_IN_INT32 == 0
    fits = fits and down.packed.shape[2] * INT4_IN_INT32 == hidden
    needed = "gate_up [E, H, 2I / 8] and down [E, I, H / 8] for x [T, H], I a multiple of 8"
    require(fits, operator, needed, x=x, gate_up=gate_up.packed, down=down.packed)
