"""grouped_linear against autograd on the dense weights."""

from __future__ import annotations

import pytest
import torch

from qerl_rl.model.base_weight import Base, Unpacker
from qerl_rl.model.grouped_linear import Adapter, grouped_linear
from qerl_rl.quant.formats import FORMATS, Format, get_format
from qerl_rl.quant.int4 import W4A8, W4A16Asymmetric

ROWS = [0, 9, 5, 1, 0, 7]
GROUPS, INPUTS, OUTPUTS, RANK, SCALING = len(ROWS), 64, 40, 4, 0.5
STORED = {
    **{name: get_format(name, 32 if name.startswith("w4") else 0) for name in FORMATS},
    "w4a16, scales of rows": get_format("w4a16", -1),
    "w4a8, scales of rows": get_format("w4a8", -1),
    "w4a16 with zero points, float16 scales": W4A16Asymmetric(32, torch.float16),
    "w4a8, float16 scales of rows": W4A8(0, torch.float16),
}


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _stored(format: Format) -> tuple[Base, torch.Tensor]:
    """Random experts in this format, and the weights that they stand for."""
    parts = format.quantize(_random(GROUPS, OUTPUTS, INPUTS, seed=1))
    return Base(tuple(parts[part.suffix] for part in format.parts), format), format.dequantize(parts)


def _dense(x: torch.Tensor, weight: torch.Tensor, adapter: Adapter | None) -> torch.Tensor:
    if adapter is not None:
        weight = weight + adapter.scaling * adapter.b @ adapter.a
    return torch.cat([part @ weight[group].t() for group, part in enumerate(x.split(ROWS))])


def _assert_close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", ["frozen", "trainable", *STORED])
def test_output_and_gradients_equal_the_dense_oracle(kind: str, with_adapter: bool) -> None:
    weight = _random(GROUPS, OUTPUTS, INPUTS, seed=1)
    base = Base((weight.clone().requires_grad_(kind == "trainable"),))
    if kind in STORED:
        base, weight = _stored(STORED[kind])
    oracle_weight = weight.clone().requires_grad_(kind == "trainable")
    found, expected = [], []
    for leaves in (found, expected):
        leaves.append(_random(sum(ROWS), INPUTS, seed=2).requires_grad_())
        if with_adapter:
            leaves += [_random(GROUPS, RANK, INPUTS, seed=3).requires_grad_()]
            leaves += [_random(GROUPS, OUTPUTS, RANK, seed=4).requires_grad_()]
    y = grouped_linear(found[0], base, Adapter(found[1], found[2], SCALING) if with_adapter else None, ROWS)
    oracle = _dense(expected[0], oracle_weight, Adapter(expected[1], expected[2], SCALING) if with_adapter else None)
    _assert_close(y, oracle)
    grad = _random(*y.shape, seed=5)
    y.backward(grad)
    oracle.backward(grad)
    for leaf, reference in zip(found, expected, strict=True):
        _assert_close(leaf.grad, reference.grad)
    if kind == "trainable":
        _assert_close(base.tensors[0].grad, oracle_weight.grad)


def test_adapters_and_trainable_weights_get_zero_gradients_when_no_group_has_rows() -> None:
    weight = _random(3, OUTPUTS, INPUTS, seed=1).requires_grad_()
    a, b = _random(3, RANK, INPUTS, seed=2).requires_grad_(), _random(3, OUTPUTS, RANK, seed=3).requires_grad_()
    x = torch.zeros(0, INPUTS, requires_grad=True)
    grouped_linear(x, Base((weight,)), Adapter(a, b, 1.0), [0, 0, 0]).sum().backward()
    for leaf in (weight, a, b):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("kind", STORED)
def test_frozen_quantized_base_keeps_neither_its_input_nor_a_float_copy(kind: str) -> None:
    kept: list[torch.Tensor] = []
    x = _random(sum(ROWS), INPUTS, seed=2).requires_grad_()
    base, _ = _stored(STORED[kind])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        grouped_linear(x, base, None, ROWS)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in base.tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STORED)
def test_unpacked_weights_are_the_formats_own_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    format = STORED[kind]
    base, exact = _stored(format)
    unpacker = Unpacker(base, dtype)
    for group in reversed(range(GROUPS)):
        found, expected = unpacker.matrix(group), exact[group].to(dtype)
        if base.row_scales is not None:
            found, expected = found.float() * base.row_scales[group, :, None], exact[group]
        assert torch.equal(found, expected)


@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kind", STORED)
def test_bfloat16_stays_near_the_float32_result(kind: str, with_adapter: bool) -> None:
    base, _ = _stored(STORED[kind])
    leaves = [
        _random(sum(ROWS), INPUTS, seed=2),
        _random(GROUPS, RANK, INPUTS, seed=3),
        _random(GROUPS, OUTPUTS, RANK, seed=4),
    ]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        x, a, b = (leaf.to(torch.bfloat16).to(dtype).requires_grad_() for leaf in leaves)
        y = grouped_linear(x, base, Adapter(a, b, SCALING) if with_adapter else None, ROWS)
        y.backward(torch.ones_like(y))
        results.append((y.detach().float(), x.grad.float()))  # type: ignore[union-attr]
    for exact, rounded in zip(*results, strict=True):
        assert float((exact - rounded).norm() / exact.norm()) < 0.01
