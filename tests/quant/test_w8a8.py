"""int8 weights agree bit for bit with compressed-tensors, the library whose files vLLM reads."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.quant import w8a8


def library_compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The library's own compressor on one matrix [N, K] in float32."""
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    scale, zero_point = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    return BaseCompressor.get_value_from_registry("int-quantized").compress(state, scheme)


def library_decompress(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry("int-quantized")
    return compressor.decompress({"weight": quantized, "weight_scale": scale}, scheme)["weight"]


def matrix(seed: int, rows: int, columns: int) -> torch.Tensor:
    """Rows of very different sizes, one of zeros, one with its only value at the end."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.empty(rows, 1).uniform_(-6, 3, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * sizes
    weight[0] = 0
    weight[-1, :-1] = 0
    return weight


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 9), columns=st.integers(1, 33))
def test_quantize_and_dequantize_are_bit_identical_to_compressed_tensors(seed: int, rows: int, columns: int) -> None:
    weight = matrix(seed, rows, columns)
    quantized, scale = w8a8.quantize(weight)
    theirs = library_compress(weight)
    assert quantized.dtype == torch.int8
    assert torch.equal(quantized, theirs["weight"])
    assert torch.equal(scale, theirs["weight_scale"])
    assert torch.equal(w8a8.dequantize(quantized, scale), library_decompress(quantized, scale))


def test_dequantize_rounds_the_float32_product_once() -> None:
    quantized, scale = w8a8.quantize(matrix(0, 16, 64))
    expected = library_decompress(quantized, scale).to(torch.bfloat16)
    assert torch.equal(w8a8.dequantize(quantized, scale, torch.bfloat16), expected)


def test_stacked_experts_quantize_like_one_after_the_other() -> None:
    stack = torch.stack([matrix(seed, 6, 20) for seed in range(4)])
    quantized, scale = w8a8.quantize(stack)
    assert quantized.shape == stack.shape
    assert scale.shape == (4, 6, 1)
    for expert, weight in enumerate(stack):
        one, one_scale = w8a8.quantize(weight)
        assert torch.equal(quantized[expert], one)
        assert torch.equal(scale[expert], one_scale)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_error_is_at_most_half_a_step_and_the_largest_value_loses_at_most_that(seed: int) -> None:
    weight = matrix(seed, 8, 32)
    quantized, scale = w8a8.quantize(weight)
    error = (w8a8.dequantize(quantized, scale) - weight).abs()
    # A step is max / 127.5, so +max lies half a step beyond the last point, 127.
    assert (error <= scale * 0.5001).all()


def test_quantizing_again_changes_nothing_when_the_grid_is_kept() -> None:
    quantized, scale = w8a8.quantize(matrix(3, 8, 32))
    again = torch.round(w8a8.dequantize(quantized, scale) / scale).to(torch.int8)
    assert torch.equal(again, quantized)


def test_rows_of_zeros_stay_zero_with_a_usable_scale() -> None:
    quantized, scale = w8a8.quantize(torch.zeros(3, 5))
    assert not quantized.any()
    assert (scale > 0).all()
    assert not w8a8.dequantize(quantized, scale).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    weight = matrix(1, 4, 16).clamp(-100, 100).to(dtype)
    quantized, scale = w8a8.quantize(weight)
    assert scale.dtype == torch.float32
    assert torch.equal(quantized, library_compress(weight.float())["weight"])


def test_config_is_one_the_library_parses_as_int8_with_dynamic_tokens() -> None:
    config = QuantizationConfig.model_validate(w8a8.W8A8().quantization_config(["lm_head"]))
    assert config.format == "int-quantized"
    assert config.ignore == ["lm_head"]
    scheme = config.config_groups["group_0"]
    assert (scheme.weights.num_bits, scheme.weights.strategy, scheme.weights.symmetric) == (8, "channel", True)
    assert (scheme.input_activations.strategy, scheme.input_activations.dynamic) == ("token", True)
