"""Loops over bfloat16 against torch's arithmetic in float32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.platform import bfloat16_loops
from qerl_rl.platform.ops import swiglu
from qerl_rl.quant.formats import get_format

HALF_STEP = 2.0**-8
"""Half a step of the last of bfloat16's eight bits: the largest relative error of rounding once."""
FEW = 2.0**-20
"""Relative error of a handful of float32 operations."""


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_int8_is_converted_exactly() -> None:
    integers = torch.arange(-128, 128, dtype=torch.int8).view(16, 16)
    converted = bfloat16_loops.convert_int8(integers, torch.empty(16, 16, dtype=torch.bfloat16))
    assert converted.tolist() == integers.tolist()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_times_scales_are_the_formats_floats_bit_for_bit(group_size: int) -> None:
    format = get_format("w4a16", group_size)
    parts = format.quantize(_random(3, 16, 256, seed=group_size))
    packed = parts["_packed"].view(torch.uint8)
    assert bfloat16_loops.has_loops(parts["_scale"])
    found = bfloat16_loops.multiply_int4(packed, parts["_scale"])
    assert torch.equal(found, format.dequantize(parts, torch.float32).to(torch.bfloat16))
    assert torch.equal(found[1], format.dequantize({key: part[1] for key, part in parts.items()}, torch.bfloat16))


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.integers(0, 9), columns=st.integers(1, 70), seed=st.integers(0, 99))
def test_scaled_columns_are_float32_products_rounded_to_bfloat16(rows: int, columns: int, seed: int) -> None:
    matrix = _random(rows, columns, seed=seed).to(torch.bfloat16)
    scales = _random(columns, seed=seed + 100).abs() * 1e-3
    found = bfloat16_loops.scale_columns(matrix, scales, torch.empty_like(matrix))
    assert torch.equal(found, (matrix.float() * scales).to(torch.bfloat16))


def test_infinities_and_no_numbers_stay_what_they_are() -> None:
    matrix = torch.tensor([[float("inf"), float("-inf"), float("nan"), 3.3e38, 0.0]]).bfloat16()
    scales = torch.tensor([1.0, 1.0, 1.0, 2.0, float("inf")])
    found = bfloat16_loops.scale_columns(matrix, scales, torch.empty_like(matrix))
    torch.testing.assert_close(found, (matrix.float() * scales).bfloat16(), rtol=0, atol=0, equal_nan=True)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.integers(0, 9), width=st.integers(1, 40), spread=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 99))
def test_swiglu_and_its_gradients_are_those_of_float32_rounded_once(
    rows: int, width: int, spread: float, seed: int
) -> None:
    hidden = (_random(rows, 2 * width, seed=seed) * spread).bfloat16().requires_grad_()
    probabilities = _random(rows, seed=seed + 1).sigmoid().requires_grad_()
    gradient = _random(rows, width, seed=seed + 2).bfloat16()
    output = swiglu(hidden, probabilities)
    output.backward(gradient)

    exact, weights = (leaf.detach().double().requires_grad_() for leaf in (hidden, probabilities))
    gate, up = exact.chunk(2, -1)
    oracle = F.silu(gate) * up * weights[:, None]
    oracle.backward(gradient.double())
    for found, expected in ((output, oracle), (hidden.grad, exact.grad)):
        assert found is not None
        assert found.dtype == torch.bfloat16
        # From e^-87 on, sigmoids are that small and no smaller.
        torch.testing.assert_close(found.double(), expected, rtol=HALF_STEP + FEW, atol=1e-33)
    # A sum whose parts may cancel: its error follows their size.
    size = (gradient.double() * oracle.detach() / weights.detach()[:, None]).abs().sum(-1)
    assert probabilities.grad is not None
    assert bool(((probabilities.grad - weights.grad).abs() <= FEW * size).all())


def test_rows_do_not_depend_on_the_others() -> None:
    """What a token gets is the same in every micro-batch."""
    hidden, gradient = _random(37, 96, seed=1).bfloat16(), _random(37, 48, seed=2).bfloat16()
    probabilities = _random(37, seed=3).sigmoid()
    together = bfloat16_loops.weighted_swiglu_backward(gradient, hidden, probabilities)
    for row in (slice(0, 1), slice(5, 8), slice(36, 37)):
        alone = bfloat16_loops.weighted_swiglu_backward(gradient[row], hidden[row], probabilities[row])
        assert all(torch.equal(whole[row], part) for whole, part in zip(together, alone, strict=True))
    assert torch.equal(together[2], bfloat16_loops.weighted_swiglu(hidden, probabilities))


@pytest.mark.parametrize("weight_type", [torch.bfloat16, torch.float32])
@settings(deadline=None, derandomize=True, max_examples=20)
@given(rows=st.integers(0, 5), heads=st.integers(1, 3), width=st.integers(1, 70), seed=st.integers(0, 99))
def test_rms_norm_is_the_papers_rounded(weight_type: torch.dtype, rows: int, heads: int, width: int, seed: int) -> None:
    # Queries come as views of the fused projection.
    x = _random(rows, 2 * heads * width, seed=seed).bfloat16()[:, : heads * width].unflatten(1, (heads, width))
    weight, residual = _random(width, seed=seed + 1).to(weight_type), _random(*x.shape, seed=seed + 2).bfloat16()

    def norm(exact: torch.Tensor) -> torch.Tensor:
        return weight.double() * exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    # The quotient is rounded where the weight is bfloat16, and then the product.
    error = (HALF_STEP * (2 + HALF_STEP) if weight_type == torch.bfloat16 else HALF_STEP) + FEW
    alone = bfloat16_loops.rms_norm(x, weight, 1e-6)
    normed, total = bfloat16_loops.rms_norm(x, weight, 1e-6, residual)
    assert torch.equal(total, x + residual)
    for found, exact in ((alone, x.double()), (normed, x.double() + residual.double())):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), norm(exact), rtol=error, atol=1e-35)


def test_rms_norm_of_a_token_does_not_depend_on_the_others() -> None:
    x, weight, residual = _random(9, 96, seed=1).bfloat16(), _random(96, seed=2), _random(9, 96, seed=3).bfloat16()
    together = bfloat16_loops.rms_norm(x, weight, 1e-6, residual)
    alone = bfloat16_loops.rms_norm(x[4:5], weight, 1e-6, residual[4:5])
    assert all(torch.equal(whole[4:5], part) for whole, part in zip(together, alone, strict=True))


def test_what_a_loop_has_read_or_written_can_still_leave_memory() -> None:
    """The trainer empties the storages of its weights; torch refuses that once it has given a numpy array of one."""
    matrix, scales = _random(4, 8, seed=1).bfloat16(), _random(8, seed=2)
    out = bfloat16_loops.scale_columns(matrix, scales, torch.empty_like(matrix))
    for tensor in (matrix, scales, out):
        assert tensor.untyped_storage().resizable()


def test_views_of_any_strides_give_what_their_copies_give() -> None:
    hidden, gradient = _random(32, 6, seed=1).bfloat16().t(), torch.ones((), dtype=torch.bfloat16).expand(6, 16)
    probabilities = _random(12, seed=2).sigmoid()[::2]
    found = bfloat16_loops.weighted_swiglu_backward(gradient, hidden, probabilities)
    copies = (tensor.contiguous() for tensor in (gradient, hidden, probabilities))
    expected = bfloat16_loops.weighted_swiglu_backward(*copies)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    # Sums in float32, in another order.
    torch.testing.assert_close(found[1], expected[1])


def test_numbers_of_another_length_are_refused() -> None:
    matrix = _random(4, 8, seed=1).bfloat16()
    with pytest.raises(TypeError, match=r"torch\.float64 are not as long as those of float32"):
        bfloat16_loops.scale_columns(matrix, _random(8, seed=2).double(), torch.empty_like(matrix))
