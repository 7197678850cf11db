"""What the CPU kernels packed is read again bit for bit, without a copy of it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.quant.base import Parts
from qerl_rl.quant.w8a8 import W8A8
from qerl_rl.rollout.packed_experts import PackedW8A8, int8_tiles
from tests.ranks import run_engines

EXAMPLES = 40


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def _pack_and_unpack(experts: int, row_tiles: int, column_tiles: int, seed: int) -> None:
    """Rows and columns as the kernel takes them: multiples of 32."""
    rows, columns = 32 * row_tiles, 32 * column_tiles
    weight, scale = _random(experts, rows, columns, seed=seed), torch.rand(experts, rows, 1) + 0.5
    packed, format = torch.ops._C.convert_weight_packed(weight), PackedW8A8()
    tiles = int8_tiles(packed)
    assert tiles.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
    assert format.matrix_shape(tiles) == (rows, columns)
    scratch = torch.empty(rows, columns, dtype=torch.int8)
    for expert in range(experts):
        parts: Parts = {"": tiles[expert], "_scale": scale[expert]}
        for found in (format.unpacked(parts), format.unpacked(parts, scratch)):
            assert torch.equal(found[""], weight[expert])
            assert torch.equal(found["_scale"], scale[expert])
        expected = W8A8().dequantize({"": weight[expert], "_scale": scale[expert]})
        assert torch.equal(format.dequantize(parts), expected)


def _unpack_what_was_packed() -> None:
    from vllm import _custom_ops  # noqa: F401 - brings the kernels

    _pack_and_unpack()


def test_int8_of_any_shape_is_read_out_of_the_memory_of_the_kernel() -> None:
    run_engines(_unpack_what_was_packed, 1)
