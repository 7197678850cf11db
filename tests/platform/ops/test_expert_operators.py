"""Grouped products, routing, permutation and quantization: against dense loops, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.platform.ops import (
    Int4Matrices,
    add_noise,
    decode_experts_int4,
    dynamic_quantize,
    gating_top_k_softmax,
    grouped_matmul,
    grouped_matmul_int4,
    grouped_matmul_int8,
    grouped_matmul_int8_weights,
    normal_numbers,
    pack_int4,
    repack_int4,
    to_fractal_nz,
    token_permute,
    token_unpermute,
    unpack_int4,
)
from qerl_rl.quant.formats import get_format
from qerl_rl.quant.int4 import W4A16, W4A16Asymmetric

SIMPLE = settings(deadline=None, derandomize=True, max_examples=20)
COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _integers(low: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def _dense(x: torch.Tensor, matrices: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Row by row: x[t] times the matrix [K, N] of its group."""
    owners = [group for group, count in enumerate(rows) for _ in range(count)]
    products = [row @ matrices[owner] for row, owner in zip(x, owners, strict=True)]
    return torch.stack(products) if products else x.new_empty(0, matrices.shape[2])


@SIMPLE
@given(rows=COUNTS, inputs=st.integers(1, 5), outputs=st.integers(1, 5))
def test_grouped_product_is_that_of_rows_with_their_own_matrix(rows: list[int], inputs: int, outputs: int) -> None:
    x, weight = _random(sum(rows), inputs, seed=1), _random(len(rows), outputs, inputs, seed=2)
    torch.testing.assert_close(grouped_matmul(x, weight, rows), _dense(x, weight.transpose(1, 2), rows))


@pytest.mark.parametrize("rows", [[2, 0, 3], [0, 0, 4], [0, 0, 0]])
def test_gradients_of_the_grouped_product_are_the_numerical_ones_and_zero_for_idle_groups(rows: list[int]) -> None:
    x = _random(sum(rows), 4, seed=1).requires_grad_()
    weight = _random(3, 2, 4, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: grouped_matmul(x, weight, rows), (x, weight))
    grouped_matmul(x, weight, rows).sum().backward()
    for group, count in enumerate(rows):
        assert bool(weight.grad[group].any()) == bool(count)


@SIMPLE
@given(rows=COUNTS, outputs=st.integers(1, 9))
def test_int8_product_is_the_integers_times_both_scales(rows: list[int], outputs: int) -> None:
    tokens, inputs = sum(rows), 16
    x, weight = (
        _integers(-128, 128, tokens, inputs, seed=1).to(torch.int8),
        _integers(-128, 128, len(rows), outputs, inputs, seed=2).to(torch.int8),
    )
    x_scale = _random(tokens, seed=3, dtype=torch.float32).abs()
    weight_scale = _random(len(rows), outputs, seed=4, dtype=torch.bfloat16).abs()
    floats = weight.double() * weight_scale.double()[..., None]
    expected = _dense(x.double() * x_scale.double()[:, None], floats.transpose(1, 2), rows)
    found = grouped_matmul_int8(x, x_scale, weight, weight_scale, rows)
    assert found.dtype == torch.bfloat16
    # One rounding to the 8 bits of bfloat16, after three to the 24 of float32.
    torch.testing.assert_close(found.double(), expected, rtol=2**-8 + 2**-20, atol=1e-30)


@SIMPLE
@given(rows=COUNTS, outputs=st.integers(1, 9))
def test_product_with_int8_weights_and_its_gradient_are_those_of_the_integers(rows: list[int], outputs: int) -> None:
    weight = _integers(-128, 128, len(rows), outputs, 16, seed=1).to(torch.int8)
    found, expected = (_random(sum(rows), 16, seed=2, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    # Each int8 is a bfloat16.
    y, oracle = grouped_matmul_int8_weights(found, weight, rows), grouped_matmul(expected, weight.bfloat16(), rows)
    assert torch.equal(y, oracle)
    gradient = _random(*y.shape, seed=3, dtype=torch.bfloat16)
    y.backward(gradient)
    oracle.backward(gradient)
    assert torch.equal(found.grad, expected.grad)


@SIMPLE
@given(experts=st.integers(1, 3), outputs=st.integers(1, 4), words=st.integers(1, 4))
def test_repacked_checkpoint_weights_are_those_of_the_format_transposed(experts: int, outputs: int, words: int) -> None:
    format = get_format("w4a16", -1)
    parts = format.quantize(_random(experts, 8 * outputs, 8 * words, seed=outputs, dtype=torch.float32))
    floats = format.dequantize(parts).transpose(1, 2)
    repacked = repack_int4(parts["_packed"])
    assert repacked.shape == (experts, 8 * words, outputs)
    assert torch.equal(unpack_int4(repacked) * parts["_scale"].transpose(1, 2), floats)


@SIMPLE
@given(chosen=st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), max_size=8), with_offset=st.booleans())
def test_experts_of_a_few_tokens_are_the_textbooks_on_the_formats_floats(
    chosen: list[list[int]], with_offset: bool
) -> None:
    format = (W4A16Asymmetric if with_offset else W4A16)(32, torch.float32)
    matrices, floats = [], []
    for seed, shape in ((1, (4, 2 * 32, 64)), (2, (4, 64, 32))):
        parts = format.quantize(_random(*shape, seed=seed, dtype=torch.float32))
        floats.append(format.dequantize(parts).double())
        offset = -parts["_zero_point"].float().transpose(1, 2) if with_offset else None
        matrices.append(Int4Matrices(repack_int4(parts["_packed"]), parts["_scale"].transpose(1, 2), offset))
    indices = torch.tensor(chosen, dtype=torch.int64).view(-1, 2)
    x, weights = (_random(len(indices), size, seed=size, dtype=torch.float32) for size in (64, 2))
    expected = torch.zeros(len(indices), 64, dtype=torch.float64)
    for token, slot in (indices >= 0).nonzero().tolist():
        expert = indices[token, slot]
        gate, up = (floats[0][expert] @ x[token].double()).chunk(2)
        expected[token] += floats[1][expert] @ (torch.nn.functional.silu(gate) * up) * weights[token, slot].double()
    found = decode_experts_int4(x, indices, weights, *matrices)
    # 96 roundings of float32 in the two sums, of numbers that may be a few times the result.
    largest = float(expected.abs().max()) if len(expected) else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-16 * largest)


@SIMPLE
@given(rows=COUNTS, groups=st.sampled_from([1, 2, 4]), with_offset=st.booleans())
def test_int4_product_and_its_gradient_are_those_of_the_floats_it_stands_for(
    rows: list[int], groups: int, with_offset: bool
) -> None:
    inputs, outputs = 8, 16
    values = _integers(-8, 8, len(rows), inputs, outputs, seed=1).int()
    scale = _random(len(rows), groups, outputs, seed=2, dtype=torch.bfloat16)
    offset = _integers(-4, 5, len(rows), groups, outputs, seed=3).to(torch.bfloat16) if with_offset else None
    shifted = values.double() + (0.0 if offset is None else offset.double().repeat_interleave(inputs // groups, 1))
    # What the operator multiplies with is bfloat16.
    floats = (shifted * scale.double().repeat_interleave(inputs // groups, 1)).bfloat16()
    found, expected = (_random(sum(rows), inputs, seed=4, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    y = grouped_matmul_int4(found, pack_int4(values), scale, rows, offset)
    oracle = grouped_matmul(expected, floats.transpose(1, 2), rows)
    assert torch.equal(y, oracle)
    gradient = _random(*y.shape, seed=5, dtype=torch.bfloat16)
    y.backward(gradient)
    oracle.backward(gradient)
    assert torch.equal(found.grad, expected.grad)


@SIMPLE
@given(matrices=st.integers(0, 3), columns=st.integers(1, 4))
def test_packed_int4_come_back_and_lie_lowest_first(matrices: int, columns: int) -> None:
    values = _integers(-8, 8, matrices, 5, 8 * columns, seed=columns).int()
    packed = pack_int4(values)
    assert packed.dtype == torch.int32
    assert torch.equal(unpack_int4(packed).int(), values)
    words = packed.numpy().view(np.uint32).astype(np.int64)
    assert np.array_equal((words >> 8) & 15, values.numpy()[..., 2::8] & 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_quantization_is_within_half_a_step_and_uses_the_whole_range(dtype: torch.dtype) -> None:
    x = _random(7, 3, 32, seed=1, dtype=dtype)
    x[2, 1] = 0.0
    quantized, scale = dynamic_quantize(x)
    assert (quantized.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (7, 3))
    error = (quantized.double() * scale.double()[..., None] - x.double()).abs()
    # Half a step, and the rounding of the scale itself, which counts up to 127 times.
    assert bool((error <= scale.double()[..., None] * (0.5 + 127 * 2**-23)).all())
    assert torch.equal(quantized.abs().amax(-1) == 127, x.abs().amax(-1) > 0)
    assert not quantized[2, 1].any()


@SIMPLE
@given(tokens=st.integers(0, 6), experts=st.integers(1, 6), data=st.data())
def test_gating_is_softmax_then_the_largest(tokens: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    logits = _random(tokens, experts, seed=experts).requires_grad_()
    found, chosen = gating_top_k_softmax(logits, k)
    expected, indices = logits.softmax(-1).sort(-1, descending=True)
    assert torch.equal(chosen, indices[:, :k].int())
    torch.testing.assert_close(found, expected[:, :k])
    assert torch.autograd.gradcheck(lambda logits: gating_top_k_softmax(logits, k)[0], (logits,))


def test_gating_of_bfloat16_chooses_before_it_rounds() -> None:
    # In bfloat16 the two probabilities are the same number.
    logits = torch.tensor([[1.0, 1.0078125, -5.0]], dtype=torch.bfloat16)
    probabilities, experts = gating_top_k_softmax(logits, 1)
    assert experts.tolist() == [[1]]
    assert probabilities.dtype == torch.bfloat16


@SIMPLE
@given(tokens=st.integers(0, 7), experts=st.integers(1, 5), k=st.integers(1, 3))
def test_permuted_rows_are_sorted_by_expert_and_come_back(tokens: int, experts: int, k: int) -> None:
    x, chosen = _random(tokens, 4, seed=1), _integers(0, experts, tokens, k, seed=2)
    permuted, positions = token_permute(x, chosen)
    copies = sorted((int(chosen[token, slot]), token, slot) for token in range(tokens) for slot in range(k))
    assert torch.equal(permuted, x[[token for _, token, _ in copies]])
    places = {(token, slot): place for place, (_, token, slot) in enumerate(copies)}
    assert positions.tolist() == [places[token, slot] for token in range(tokens) for slot in range(k)]
    weights = _random(tokens, k, seed=3).softmax(-1)
    torch.testing.assert_close(token_unpermute(permuted, positions, weights), x)


def test_gradients_of_permutation_are_the_numerical_ones() -> None:
    chosen = _integers(0, 4, 5, 2, seed=1)
    x, weights = _random(5, 3, seed=2).requires_grad_(), _random(5, 2, seed=3).requires_grad_()

    def there_and_back(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        permuted, positions = token_permute(x, chosen)
        return token_unpermute(permuted.sin(), positions, weights)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


def test_noise_is_added_in_float32() -> None:
    clean = _random(3, 3, seed=1, dtype=torch.bfloat16)
    numbers = normal_numbers(7, 11, 13, 9).reshape(3, 3)
    expected = clean.float().numpy() + np.float32(0.01) * numbers
    assert np.array_equal(add_noise(clean, 7, 11, 13, 0.01).numpy(), expected)


def test_memory_format_is_left_alone_elsewhere() -> None:
    weight = _random(2, 3, seed=1)
    assert to_fractal_nz(weight) is weight
