"""Rounding that keeps small changes: right on average for every grid, the same on every shard."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.quant.formats import FORMATS, get_format
from qerl_rl.quant.requantize import Shard, Survival, merged_bfloat16, merged_parts, requantized, scale_growth
from qerl_rl.quant.rounding import Rounding, round_change, round_to_bfloat16

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
        assert stream.min() > 0
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
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([0, (1 << 32) // 70 - 20]), st.data())
def test_any_rows_and_columns_have_the_numbers_that_they_have_in_the_full_weight(
    rows: int, width: int, above: int, data: st.DataObject
) -> None:
    first, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, width - 1))
    count, columns = data.draw(st.integers(1, rows - first)), data.draw(st.integers(1, width - left))
    rounding = Rounding(True, 5, 7)
    full = rounding.rows("w", above, rows, width)
    part = rounding.rows("w", above + first, count, columns, left, width)
    assert full is not None
    assert part is not None
    assert torch.equal(full[first : first + count, left : left + columns], part)


@pytest.mark.parametrize("name", [*FORMATS, "bfloat16"])
@pytest.mark.parametrize("stochastic", [True, False])
def test_shards_merge_to_the_bits_of_the_whole(name: str, stochastic: bool) -> None:
    """Cut by rows, into a single one too, and by columns (a scale for a whole row grows as the largest needs)."""
    generator, rounding = torch.Generator().manual_seed(4), Rounding(stochastic, 2, 3)
    weight = torch.randn(65, 512, generator=generator) / 20
    a, b = torch.randn(8, 512, generator=generator) / 8, torch.randn(65, 8, generator=generator) / 10
    format = None if name == "bfloat16" else get_format(name)
    parts = {"": weight.bfloat16()} if format is None else format.quantize(weight)

    def cut(part: str, columns: slice) -> slice:
        unit = next((each.columns for each in format.parts if each.suffix == part), 1) if format else 1
        return slice(columns.start // unit, columns.stop // unit) if unit else slice(None)

    def merged(rows: slice, columns: slice, growth: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        own = {key: part[rows, cut(key, columns)] for key, part in parts.items()}
        factors, shard = (a[:, columns], b[rows]), Shard("w", rows.start, columns.start, 512)
        if format is None:
            return {"": merged_bfloat16(own[""], *factors, rounding, shard, Survival())}
        if growth is None and not format.group_size:
            growth = scale_growth(format, own, *factors, stochastic)
            for other in (slice(0, 128), slice(128, 512)):
                there = {key: part[rows, cut(key, other)] for key, part in parts.items()}
                growth = torch.maximum(growth, scale_growth(format, there, a[:, other], b[rows], stochastic))
        return merged_parts(format, own, *factors, rounding, shard, Survival(), growth)

    whole = merged(slice(0, 65), slice(0, 512))
    for rows in (slice(0, 40), slice(40, 64), slice(64, 65)):
        for columns in (slice(0, 512), slice(0, 128), slice(128, 512)):
            for key, part in merged(rows, columns).items():
                assert torch.equal(part.float(), whole[key][rows, cut(key, columns)].float())
    if format is not None and not format.group_size:
        assert (whole["_scale"] > parts["_scale"]).any()
        assert not (whole["_scale"] > parts["_scale"]).all()


def _unbiased(outcomes: torch.Tensor, wanted: torch.Tensor, gap: torch.Tensor, resolution: float) -> None:
    """The mean of `outcomes` over SEEDS draws [SEEDS, ...] is `wanted`, element by element and all in all.

    Within 6 standard deviations of a mean, and 5 of the sum of all, as the draws themselves spread; an element that
    hardly ever leaves its place may be 12 draws off (an event expected 12 times in SEEDS stays away in one of 160,000
    cases). gap: how far its neighbours on the grid are; resolution: what float32 leaves of one.
    """
    error, spread = outcomes.mean(0) - wanted, outcomes.std(0) / math.sqrt(SEEDS)
    assert (error.abs() <= 6 * spread + (12 / SEEDS + resolution) * gap).all()
    assert abs(error.sum()) <= 5 * spread.square().sum().sqrt() + resolution * gap.sum()


FORMATS_WITH_GROUPS = [
    *(("w8a8", -1), ("w4a16", 32), ("w4a16", -1), ("w4a8", 64), ("nvfp4", 16), ("mxfp4", 32), ("mxfp8", 32)),
]


@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
@pytest.mark.parametrize(("name", "group"), FORMATS_WITH_GROUPS)
def test_every_format_is_right_on_average_also_where_its_grid_ends(name: str, group: int, size: float) -> None:
    """size: of the change, in the distances of the grid's smallest numbers.

    Half of the largest numbers of each group are carried beyond the end. NVFP4's groups with the largest scale there is
    can't have a larger one: they are left out.
    """
    format = get_format(name, group)
    generator = torch.Generator().manual_seed(1)
    parts = format.quantize(torch.randn(8, 128, generator=generator) / 20)
    steps = format.steps(parts)[..., None]
    finest = float(format.grid.diff().min()) if name != "mxfp8" else 0.125
    change = torch.randn(8, steps.shape[1], 128 // steps.shape[1], generator=generator) * size * finest * steps
    outcomes, grown = [], parts
    for seed in range(SEEDS):
        grown, moved = requantized(format, parts, change.flatten(-2), _thresholds(torch.Size((8, 128)), seed))
        outcomes.append(moved.view_as(change))
        # What it says to have moved is what the parts say, but for the bfloat16 that some of them end in.
        found = format.dequantize(grown) - format.dequantize(parts)
        assert (found - moved).abs().max() <= 2.0**-8 * (format.dequantize(grown).abs().max() * 2)
    longer = format.steps(grown)[..., None]
    reach = (format.dequantize(parts).view_as(change) + change) / longer
    over = torch.maximum(reach / format.grid[-1], reach / format.grid[0]).amax(-1, keepdim=True)
    # (Weights of most formats come as bfloat16.)
    cut = (over > 1 + 2.0**-8).expand_as(change)
    assert not cut.any() or name == "nvfp4"
    assert (grown["_scale"].float()[..., None].expand_as(change)[cut] == 448).all()
    far = float(format.grid.diff().max())
    _unbiased(torch.stack(outcomes)[:, ~cut], change[~cut], (far * longer).expand_as(change)[~cut], 2.0**-20)


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


def _merge(
    name: str, size: float, rounding: Rounding
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Survival]:
    format, generator = get_format(name), torch.Generator().manual_seed(0)
    parts = format.quantize(torch.randn(256, 512, generator=generator) / 20)
    a, b = torch.randn(8, 512, generator=generator) / 8, torch.randn(256, 8, generator=generator) * size
    survival = Survival()
    return parts, merged_parts(format, parts, a, b, rounding, Shard("w"), survival), survival


@pytest.mark.parametrize("name", FORMATS)
def test_no_change_gives_the_base_bit_for_bit(name: str) -> None:
    for stochastic in (True, False):
        parts, merged, survival = _merge(name, 0.0, Rounding(stochastic, 1, 1))
        assert parts.keys() == merged.keys()
        _, *scales = (part.suffix for part in get_format(name).parts)
        assert all(torch.equal(merged[key].float(), parts[key].float()) for key in scales)
        # By value: FP4 has a negative 0 too.
        same = get_format(name).dequantize(merged), get_format(name).dequantize(parts)
        assert torch.equal(*same)
        assert survival.ratio == 1.0


@pytest.mark.parametrize(("name", "size"), [("w8a8", 1e-6), ("w8a8", 1e-5), ("w4a16", 1e-4), ("w4a16", 1e-3)])
def test_small_updates_survive_stochastic_rounding_and_no_other(name: str, size: float) -> None:
    """Half a step is about 6e-4 (int8) and 1e-2 (int4), a change of rank 8 about `size`."""
    total = Survival()
    for step in range(60):
        total.add(_merge(name, size, Rounding(True, 1, step))[2])
    assert abs(total.ratio - 1.0) < 0.1
    assert abs(_merge(name, size, Rounding(False))[2].ratio) < 0.1


def test_nearest_rounding_goes_to_the_nearest_point() -> None:
    """Against the library's own rounding of the sum, where no scale has to grow."""
    format, generator = get_format("w8a8"), torch.Generator().manual_seed(2)
    parts = format.quantize(torch.randn(64, 128, generator=generator))
    change = torch.randn(64, 128, generator=generator) * parts["_scale"]
    parts[""].clamp_(-100, 100)
    merged, _ = requantized(format, parts, change, None)
    assert torch.equal(merged["_scale"], parts["_scale"])
    assert torch.equal(merged[""], format.encode(format.dequantize(parts) + change, {"_scale": parts["_scale"]})[""])
