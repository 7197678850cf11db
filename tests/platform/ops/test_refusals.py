"""What does not fit is refused with what was given and what is needed: the kernels accept much that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qerl_rl.platform import ops


def _floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def _int8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def _int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def _decode(
    tokens: int = 1,
    width: int = 8,
    groups: int = 1,
    offset: torch.Tensor | None = None,
    probabilities: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two experts of 16 inputs and 8 columns, of which each token chooses both."""
    gate_up = ops.Int4Matrices(_int32(2, 16, 2), _floats(2, groups, 16), offset)
    down = ops.Int4Matrices(_int32(2, width, 2), _floats(2, 1, 16))
    chosen = torch.zeros(tokens, 2, dtype=torch.int64)
    return ops.decode_experts_int4(
        _floats(tokens, 16), chosen, _floats(tokens, 2) if probabilities is None else probabilities, gate_up, down
    )


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm of another width": (lambda: ops.rms_norm(_floats(2, 8), _floats(7), 1e-6), r"weight bfloat16\[7\]"),
    "narrower norm weight": (lambda: ops.rms_norm(_floats(2, 8).float(), _floats(8), 1e-6), r"x float32\[2, 8\]"),
    "odd hidden": (lambda: ops.swiglu(_floats(3, 5), _floats(3)), r"hidden bfloat16\[3, 5\]"),
    "probabilities of other tokens": (lambda: ops.swiglu(_floats(3, 4), _floats(2)), r"probabilities bfloat16\[2\]"),
    "rotary without batch": (lambda: ops.rotary(_floats(3, 4, 8), _floats(3, 1, 8), _floats(3, 1, 8)), "cos"),
    "rotary of other positions": (
        lambda: ops.rotary(_floats(3, 1, 4, 8), _floats(2, 1, 1, 8), _floats(2, 1, 1, 8)),
        r"x bfloat16\[3, 1, 4, 8\]",
    ),
    "rotary of two types": (
        lambda: ops.rotary(_floats(3, 1, 4, 8), _floats(3, 1, 1, 8).float(), _floats(3, 1, 1, 8)),
        "one type",
    ),
    "heads that share no keys": (
        lambda: ops.packed_attention(_floats(4, 3, 8), _floats(4, 2, 8), _floats(4, 2, 8), [4]),
        "N a multiple of G",
    ),
    "lengths of other tokens": (
        lambda: ops.packed_attention(_floats(4, 2, 8), _floats(4, 2, 8), _floats(4, 2, 8), [3]),
        r"lengths \[3\]",
    ),
    "other inputs": (
        lambda: ops.grouped_matmul(_floats(4, 8), _floats(2, 6, 7), [2, 2]),
        r"weight bfloat16\[2, 6, 7\]",
    ),
    "counts of other rows": (lambda: ops.grouped_matmul(_floats(4, 8), _floats(2, 6, 8), [2, 1]), r"rows \[2, 1\]"),
    "a count too few": (lambda: ops.grouped_matmul(_floats(4, 8), _floats(2, 6, 8), [4]), "one count a matrix"),
    "negative count": (lambda: ops.grouped_matmul(_floats(4, 8), _floats(2, 6, 8), [5, -1]), r"rows \[5, -1\]"),
    "int8 weights and float16": (
        lambda: ops.grouped_matmul_int8_weights(_floats(4, 8).half(), _int8(2, 6, 8), [2, 2]),
        r"x float16\[4, 8\]",
    ),
    "outputs that fill no word": (lambda: ops.repack_int4(_int32(2, 7, 3)), r"packed int32\[2, 7, 3\]"),
    "more tokens than a few": (lambda: _decode(tokens=33), "at most 64 pairs"),
    "experts of other columns": (lambda: _decode(width=16), r"down int32\[2, 16, 2\]"),
    "groups of four": (lambda: _decode(groups=4), r"gate_up.scale bfloat16\[2, 4, 16\]"),
    "offsets of other groups": (lambda: _decode(offset=_floats(2, 2, 16)), r"gate_up.offset bfloat16\[2, 2, 16\]"),
    "probabilities of other experts": (lambda: _decode(probabilities=_floats(1, 3)), r"probabilities bfloat16\[1, 3\]"),
    "scales of other outputs": (
        lambda: ops.grouped_matmul_int8(_int8(4, 8), torch.zeros(4), _int8(2, 6, 8), _floats(2, 5), [2, 2]),
        r"weight_scale bfloat16\[2, 5\]",
    ),
    "float scales of tokens in bfloat16": (
        lambda: ops.grouped_matmul_int8(_int8(4, 8), _floats(4), _int8(2, 6, 8), _floats(2, 6), [2, 2]),
        "float32 x_scale",
    ),
    "int4 scales in another type": (
        lambda: ops.grouped_matmul_int4(_floats(4, 8), _int32(2, 8, 2), torch.zeros(2, 1, 16), [2, 2]),
        r"scale float32\[2, 1, 16\]",
    ),
    "int4 groups that divide nothing": (
        lambda: ops.grouped_matmul_int4(_floats(4, 8), _int32(2, 8, 2), _floats(2, 3, 16), [2, 2]),
        r"scale bfloat16\[2, 3, 16\]",
    ),
    "experts of other tokens": (
        lambda: ops.token_permute(_floats(4, 8), torch.zeros(3, 2, dtype=torch.int64)),
        "experts",
    ),
    "experts in int32": (lambda: ops.token_permute(_floats(4, 8), _int32(4, 2)), r"experts int32\[4, 2\]"),
    "positions of other rows": (lambda: ops.token_unpermute(_floats(8, 4), _int32(7), _floats(4, 2)), "positions"),
    "more than all experts": (lambda: ops.gating_top_k_softmax(_floats(3, 4), 5), "k 5"),
    "a vector to quantize": (lambda: ops.dynamic_quantize(_floats(3)), r"x bfloat16\[3\]"),
    "columns that are no eights": (lambda: ops.pack_int4(_int32(4, 12)), r"values int32\[4, 12\]"),
    "int8 to pack": (lambda: ops.pack_int4(_int8(4, 8)), "int8"),
    "int64 to unpack": (lambda: ops.unpack_int4(torch.zeros(4, dtype=torch.int64)), "int64"),
    "format of a vector": (lambda: ops.to_fractal_nz(_floats(3)), "matrices"),
    "noise on integers": (lambda: ops.add_noise(_int8(3), 1, 1, 1, 0.1), r"clean int8\[3\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        call()


def test_floats_of_64_bits_are_for_references_only() -> None:
    meta = torch.zeros(2, 8, dtype=torch.float64, device="meta")
    ops.checks.require_floats("any", x=meta)
    assert torch.float64 not in ops.checks.FLOATS
