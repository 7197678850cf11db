"""Rounding that keeps small changes: right on average for every grid, the same on every shard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.quant.formats import W8A8
from qerl_rl.quant.requantize import Survival, merged_parts
from qerl_rl.quant.rounding import Rounding, changed_integers, round_change, round_to_bfloat16

SEEDS = 400


def _thresholds(shape: torch.Size, seed: int) -> torch.Tensor:
    thresholds = Rounding(True, seed, 1).rows("w", 0, shape.numel(), 1)
    assert thresholds is not None
    return thresholds.view(shape)


def test_thresholds_are_uniform_and_unlike_their_neighbours() -> None:
    """Each figure is one that independent uniform numbers have, within 5 of its standard deviations."""
    count = 1 << 18
    streams = [Rounding(True, seed, step).rows(name, 0, 512, 512) for seed, step, name in KEYS]
    for stream in streams:
        assert stream is not None
        assert 0 < stream.min()
        assert stream.max() < 1
        assert abs(stream.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)
        bins = torch.histc(stream, 256, 0, 1)
        chi_squared = ((bins - count / 256) ** 2 / (count / 256)).sum()
        assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)
        for share in (1e-2, 1e-4):
            deviation = math.sqrt(count * share * (1 - share))
            assert abs((stream < share).sum() - count * share) < 5 * deviation
        neighbours = torch.corrcoef(torch.stack([stream.flatten()[:-1], stream.flatten()[1:]]))[0, 1]
        assert abs(neighbours) < 5 / math.sqrt(count)
    correlations = torch.corrcoef(torch.stack([stream.flatten() for stream in streams])) - torch.eye(len(KEYS))
    assert correlations.abs().max() < 5 / math.sqrt(count)


KEYS = [(1, 1, "a"), (2, 1, "a"), (1, 2, "a"), (1, 1, "b"), (-3, 1 << 40, "a")]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 70), st.data())
def test_any_rows_have_the_numbers_that_they_have_in_the_full_weight(
    rows: int, columns: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    rounding = Rounding(True, 5, 7)
    full, part = rounding.rows("w", 0, rows, columns), rounding.rows("w", first, count, columns)
    assert full is not None
    assert part is not None
    assert torch.equal(full[first : first + count], part)


def _unbiased(outcomes: torch.Tensor, wanted: torch.Tensor, step: torch.Tensor, resolution: float) -> None:
    """The mean over seeds [SEEDS, ...] is `wanted`, within what independent roundings of `step` allow.

    A rounding between neighbours lies p(1-p) steps^2 about its mean, at most p = |distance to the nearer one|; 6
    deviations of the mean of SEEDS of them, and the thresholds' resolution.
    """
    distance = (wanted / step - (wanted / step).round()).abs()
    deviation = (distance * (1 - distance) / SEEDS).sqrt() * step
    # Where p is so small that a single event is rare, one event is allowed for.
    assert ((outcomes.mean(0) - wanted).abs() <= 6 * deviation + (3 / SEEDS + resolution) * step).all()
    total = (outcomes.mean(0) - wanted) / step
    spread = (distance * (1 - distance) / SEEDS).sum().sqrt()
    assert abs(total.sum()) < 5 * spread + resolution * total.numel()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_changed_integers_are_right_on_average_also_where_the_range_ends(
    bits: int, size: float, scale_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    highest = 2 ** (bits - 1) - 1
    codes = torch.randint(-highest - 1, highest + 1, (6, 4, 32), generator=generator).float()
    # Half of the groups reach an end of the range; the last is nothing but zeros.
    codes[0], codes[1, :, 0], codes[2, :, 0] = 0, highest, -highest - 1
    scale = (torch.rand(6, 4, 1, generator=generator) * 0.01 + 0.001).to(scale_dtype)
    change = torch.randn(codes.shape, generator=generator) * size * scale.float()
    wanted = codes * scale.float() + change
    outcomes = []
    for seed in range(SEEDS):
        new, longer = changed_integers(codes, scale, change, _thresholds(codes.shape, seed), bits)
        assert longer.dtype == scale_dtype
        assert (new == new.round()).all()
        assert new.min() >= -highest - 1
        assert new.max() <= highest
        outcomes.append(new * longer.float())
    needed = torch.maximum(wanted.amax(-1) / highest, wanted.amin(-1) / (-highest - 1)) / scale.float()[..., 0]
    kept = needed <= 1
    assert torch.equal(longer[kept], scale[kept])
    # bfloat16's numbers are at most 2**-7 apart, float32's 2**-23 (and two operations before).
    gap = 2.0**-7 if scale_dtype == torch.bfloat16 else 2.0**-21
    grown = longer.float()[..., 0] / scale.float()[..., 0]
    assert (grown[~kept] >= needed[~kept] * (1 - 2.0**-22)).all()
    assert (grown[~kept] <= needed[~kept] * (1 + gap)).all()
    _unbiased(torch.stack(outcomes), wanted, longer.float().expand_as(wanted), 2.0**-17)


def test_a_change_far_below_a_step_has_its_own_small_probability() -> None:
    count = 1 << 20
    thresholds = Rounding(True, 1, 1).rows("w", 0, 1024, 1024)
    for change in (1e-4, -1e-4):
        moved = round_change(torch.full((1024, 1024), change), thresholds)
        assert abs(moved.sum() - change * count) < 5 * math.sqrt(1e-4 * count)
        assert set(moved.unique().tolist()) == {0.0, math.copysign(1.0, change)}
    assert not round_change(torch.zeros(1024, 1024), thresholds).any()


def test_bfloat16_neighbours_are_right_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 32, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    exact[0, :4] = torch.tensor([0.0, -0.0, 1.0, -2.0])
    below = exact.to(torch.bfloat16).float()
    outcomes = [round_to_bfloat16(exact, _thresholds(exact.shape, seed)).float() for seed in range(SEEDS)]
    # The distance of neighbours: 2**-7 of the power of two below.
    step = 2.0 ** (exact.abs().clamp_min(1e-30).log2().floor() - 7)
    for outcome in outcomes:
        assert ((outcome - exact).abs() < step).all()
        assert torch.equal(outcome[exact == below], exact[exact == below])
    _unbiased(torch.stack(outcomes), exact, step, 2.0**-15)


def _merge(size: float, rounding: Rounding) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Survival]:
    generator = torch.Generator().manual_seed(0)
    parts = W8A8().quantize(torch.randn(256, 512, generator=generator) / 20)
    a, b = torch.randn(8, 512, generator=generator) / 8, torch.randn(256, 8, generator=generator) * size
    survival = Survival()
    return parts, merged_parts(parts, a, b, rounding=rounding, name="w", survival=survival), survival


@pytest.mark.parametrize("stochastic", [True, False])
def test_no_change_gives_the_base_bit_for_bit(stochastic: bool) -> None:
    parts, merged, survival = _merge(0.0, Rounding(stochastic, 1, 1))
    assert all(torch.equal(merged[suffix], part) for suffix, part in parts.items())
    assert survival.ratio == 1.0


@pytest.mark.parametrize("size", [1e-6, 1e-5])
def test_small_updates_survive_stochastic_rounding_and_no_other(size: float) -> None:
    """The step of these weights is about 1e-3: the changes are a thousandth and a hundredth of half of it."""
    steps = [_merge(size, Rounding(True, 1, step))[2] for step in range(60)]
    total = Survival()
    for one in steps:
        total.add(one)
    assert abs(total.ratio - 1.0) < 0.1
    # What is left moves with the scales of rows that had to grow.
    assert abs(_merge(size, Rounding(False))[2].ratio) < 0.1
