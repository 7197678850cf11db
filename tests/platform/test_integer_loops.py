"""Quotients rounded to integers in one pass, against torch's operations one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.platform.integer_loops import has_loops, round_quotients
from qerl_rl.quant.base import largest_of_groups
from qerl_rl.quant.formats import get_format

TYPES = (torch.bfloat16, torch.float32)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 3),
    width=st.integers(1, 70),
    dtype=st.sampled_from(TYPES),
    ends=st.sampled_from([(-8, 7), (-128, 127)]),
    seed=st.integers(0, 99),
)
def test_quotients_are_rounded_as_torch_rounds_them(
    rows: int, groups: int, width: int, dtype: torch.dtype, ends: tuple[int, int], seed: int
) -> None:
    weights = _random(rows, groups, width, seed=seed).to(dtype)
    steps = _random(rows, groups, 1, seed=seed + 100).abs() / 60
    expected = (weights.float() / steps).clamp(*ends).round().to(torch.int8)
    assert torch.equal(round_quotients(weights, steps, *ends), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_midpoints_go_to_the_even_integer_and_what_is_beyond_to_the_ends(dtype: torch.dtype) -> None:
    weights = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, float("inf"), float("-inf"), -0.0, 1e30]]).to(dtype)
    found = round_quotients(weights, torch.ones(1, 1), -8, 7)
    assert found.tolist() == [[-2, -2, 0, 0, 2, 2, 7, -8, 0, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w4a8"])
def test_other_types_are_rounded_as_well(name: str, dtype: torch.dtype) -> None:
    format, weight = get_format(name), _random(2, 8, 128, seed=1).half()
    assert not has_loops(weight.to(dtype))
    found, expected = format.quantize(weight.to(dtype)), format.quantize(weight.float())
    assert all(torch.equal(found[suffix], part) for suffix, part in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_magnitudes_are_exact_and_show_what_is_no_number(dtype: torch.dtype) -> None:
    weight = _random(6, 64, seed=2).to(dtype)
    weight[1], weight[2, 3], weight[3, 5] = -0.0, float("-inf"), float("nan")
    weight[3, 6] = float("inf")
    expected = weight.float().abs().unflatten(-1, (2, 32)).amax(-1)
    torch.testing.assert_close(largest_of_groups(weight, 32), expected, rtol=0, atol=0, equal_nan=True)
