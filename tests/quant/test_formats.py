"""Every format, bit for bit that of compressed-tensors; errors that its grid allows; nothing lost on the way back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant import blocks
from qerl_rl.quant.formats import FORMATS, GROUP_SIZES, Format, get_format
from tests.quant.library import library_compress, library_decompress

ALL = [(name, size) for name in FORMATS for size in GROUP_SIZES[name]]
every_format = pytest.mark.parametrize(("name", "group_size"), ALL)
prop = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def library_runs_eagerly() -> Iterator[None]:
    """It compiles its FP4 rounding otherwise, for seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


def normal(seed: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(seed: int, rows: int, width: int) -> torch.Tensor:
    """Student's t with 2 degrees of freedom (its variance is infinite), in rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    chi_square = -2.0 * torch.rand(rows, width, generator=generator).log()
    sizes = 10.0 ** torch.empty(rows, 1).uniform_(-6, 3, generator=generator)
    return torch.randn(rows, width, generator=generator) / (chi_square / 2.0).sqrt() * sizes


def special(seed: int, rows: int, width: int) -> torch.Tensor:
    """Quarters, which lie on many midpoints of every grid; then rows of zeros, of one number, of -0, of subnormals."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-28, 29, (rows, width), generator=generator) / 4.0
    weight[0] = 0.0
    weight[1, 1:] = 0.0
    weight[2] = -1e-42
    weight[3, ::2] = -0.0
    weight[4] = normal(seed, 1, width) * 1e-39
    weight[5, ::3] = 0.0
    weight[6, 0] = 7.5
    return weight


KINDS = {"normal": normal, "heavy-tailed": heavy_tailed, "special": special}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@every_format
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_and_what_comes_back_is_the_librarys(name: str, group_size: int, kind: str) -> None:
    format = get_format(name, group_size)
    # Of a single group the library takes the scale for a row's, and then leaves NVFP4 in float32.
    fewest = 2 if name == "nvfp4" else 1

    @prop
    @given(seed=st.integers(0, 2**31), rows=st.integers(7, 20), groups=st.integers(fewest, 3))
    def check(seed: int, rows: int, groups: int) -> None:
        weight = KINDS[kind](seed, rows, groups * (format.group_size or 16))
        stored, theirs = format.stored(format.quantize(weight)), library_compress(format, weight)
        assert {f"weight{suffix}" for suffix in stored} == set(theirs)
        for suffix, tensor in stored.items():
            assert same(tensor, theirs[f"weight{suffix}"]), suffix
        back = library_decompress(format, theirs)
        assert same(format.dequantize(format.loaded(stored), back.dtype), back)
        assert same(format.dequantize(format.loaded(stored)), back.float())

    check()


@every_format
def test_parts_have_the_shapes_and_types_that_they_announce(name: str, group_size: int) -> None:
    format = get_format(name, group_size)
    stack = normal(0, 6, 512).view(2, 3, 512)
    parts = format.quantize(stack)
    assert list(parts) == [part.suffix for part in format.parts]
    assert all(parts[part.suffix].shape == part.shape((2, 3, 512)) for part in format.parts)
    assert all(parts[part.suffix].dtype == part.dtype for part in format.parts)
    for i, matrix in enumerate(stack):
        assert all(same(part[i], format.quantize(matrix)[suffix]) for suffix, part in parts.items())
    columns = parts[format.parts[0].suffix].shape[-1] * format.parts[0].columns
    assert format.dequantize(parts, torch.bfloat16).shape == (2, 3, columns)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_and_threads_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small blocks on three threads give what one block gives, also for bfloat16 and for strided weights."""
    format = get_format(name)
    weight = normal(1, 33, 512).to(torch.bfloat16)[:, ::2]
    whole = format.quantize(weight)
    monkeypatch.setattr(blocks, "BLOCK", 600)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        cut = format.quantize(weight)
    finally:
        torch.set_num_threads(threads)
    assert all(same(cut[suffix], part) for suffix, part in whole.items())
    assert all(same(part, whole[suffix]) for suffix, part in format.quantize(weight.float().contiguous()).items())


def half_a_gap(format: Format, weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Half the distance of the two grid points around each weight, in its own units; beyond the ends, to the end."""
    scaled = weight.unflatten(-1, (steps.shape[-2], -1)) / steps
    above = torch.searchsorted(format.grid, scaled.contiguous()).clamp(1, len(format.grid) - 1)
    gap = (format.grid[above] - format.grid[above - 1]) / 2
    beyond = (scaled.abs() - format.grid[-1]).clamp(min=0)
    return (torch.maximum(gap, beyond) * steps).flatten(-2)


@every_format
@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
def test_errors_stay_within_half_a_gap_of_the_grid(name: str, group_size: int, kind: str) -> None:
    format = get_format(name, group_size)
    weight = KINDS[kind](3, 64, 256)
    parts = format.quantize(weight)
    back = format.dequantize(parts)
    bound = half_a_gap(format, weight, format.steps(parts)[..., None])
    # What the library decompresses to bfloat16 is off by up to 2^-8 of itself; the division by up to 2^-22.
    rounding = 2.0**-8 if any(part.dtype != torch.float32 for part in format.parts[1:]) else 2.0**-22
    assert ((back - weight).abs() <= bound + rounding * back.abs()).all()
    # A bound that is not tight would prove little: some weight comes close to it.
    assert ((back - weight).abs() >= 0.9 * bound).any()


@every_format
def test_what_lies_on_the_grid_is_kept(name: str, group_size: int) -> None:
    """Rounding the dequantized weight with the same scales gives the same values (an FP4 zero may lose its sign)."""
    format = get_format(name, group_size)
    parts = format.quantize(heavy_tailed(4, 32, 256))
    scales = {part.suffix: parts[part.suffix] for part in format.parts[1:]}
    again = format.encode(format.dequantize(parts), scales)
    assert torch.equal(format.dequantize(again), format.dequantize(parts))


def test_powers_of_two_come_out_again_from_what_they_scaled() -> None:
    """MXFP4 picks its scale so that a group's largest number becomes 4 or 6: quantizing again finds the same one."""
    format = get_format("mxfp4")
    parts = format.quantize(heavy_tailed(5, 32, 256))
    again = format.quantize(format.dequantize(parts))
    assert torch.equal(again["_scale"], parts["_scale"])
    assert torch.equal(format.dequantize(again), format.dequantize(parts))


def test_fused_matrices_share_the_scale_of_the_whole() -> None:
    """As engines fuse gate and up: alone with the pair's largest number, each is what it is as a part of the pair."""
    format = get_format("nvfp4")
    gate, up = normal(6, 8, 64), 5 * normal(7, 8, 64)
    largest = torch.stack([gate, up]).abs().amax()
    fused = format.quantize(torch.cat([gate, up]))
    for rows, matrix in ((slice(0, 8), gate), (slice(8, 16), up)):
        alone = format.quantize(matrix, largest)
        assert all(same(part, fused[suffix][rows]) for suffix, part in alone.items())
        theirs = library_compress(format, matrix, largest)
        assert all(same(tensor, theirs[f"weight{suffix}"]) for suffix, tensor in format.stored(alone).items())


@every_format
def test_config_is_read_by_the_library_as_the_preset(name: str, group_size: int) -> None:
    format = get_format(name, group_size)
    config = QuantizationConfig.model_validate(format.quantization_config(["lm_head"]))
    assert config.ignore == ["lm_head"]
    weights = config.config_groups["group_0"].weights
    assert (weights.group_size or 0) == format.group_size
    assert config.format == config.config_groups["group_0"].format == format.layout()
    assert (config.config_groups["group_0"].input_activations is not None) == name.endswith("a8")


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="96 weights can't be cut into groups of 128"):
        get_format("w4a16").quantize(torch.zeros(2, 96))
    with pytest.raises(ConfigError, match="no groups of 48"):
        get_format("w4a16", 48)
    with pytest.raises(ConfigError, match="'int3' is unknown"):
        get_format("int3")
