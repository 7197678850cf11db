"""W4A8 in msmodelslim's layout: nothing is lost on the way to it and back, and what does not fit it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader, stored_format
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.modelslim_w4a8 import SIXTEENTHS, engine_scales, pack_rows, scale_bias, unpack_rows
from qerl_rl.quant.quantize import quantize_checkpoint

DOWN = "model.layers.0.mlp.experts.3.down_proj"
CHOICES: dict[str, dict[str, Any]] = {
    "rows": {"group_size": -1, "attention": "none"},
    "groups": {"group_size": 32},
    "groups of 64, W8A8 attention": {"group_size": 64, "attention": "w8a8"},
}


@pytest.fixture
def slim(tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]) -> Path:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2)
    return tiny_quantized(source, "w4a8", layout="msmodelslim", group_size=32)


@pytest.mark.parametrize("name", CHOICES)
def test_integers_and_scales_come_back_as_compressed_tensors_has_them(
    name: str, tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]
) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2)
    ours = CheckpointReader(tiny_quantized(source, "w4a8", **CHOICES[name]))
    slim = CheckpointReader(tiny_quantized(source, "w4a8", layout="msmodelslim", **CHOICES[name]))
    assert stored_format(slim.path) == "w4a8"
    assert slim.weights() == ours.weights()
    for weight in ours.weights():
        expected, found = ours.format_of(weight), slim.format_of(weight)
        if expected is None:
            assert torch.equal(slim.get(weight), ours.get(weight))
            continue
        assert found is not None
        assert (found.name, found.group_size) == (expected.name, expected.group_size)
        for suffix, part in ours.parts(weight).items():
            # Scales of groups are float32 here, and the same numbers.
            assert torch.equal(slim.parts(weight)[suffix], part.to(slim.parts(weight)[suffix].dtype)), weight
    # Half of the bytes: two numbers in each.
    assert slim.shape(f"{DOWN}.weight") == (ours.shape(f"{DOWN}.weight")[0] // 2, ours.shape(f"{DOWN}.weight")[1])
    assert set(slim) <= set(json.loads((slim.path / ModelSlimFormats.file_name).read_text()))


@settings(deadline=None, derandomize=True)
@given(pairs=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_rows_in_pairs_come_back(pairs: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-8, 8, (2 * pairs, columns), dtype=torch.int8, generator=generator)
    packed = pack_rows(weight)
    assert packed.shape == (pairs, columns)
    assert torch.equal(unpack_rows(packed), weight)
    # The even row is below: as an unsigned byte, what it is modulo 16.
    assert torch.equal(packed.view(torch.uint8) % 16, (weight[::2] % 16).view(torch.uint8))


def test_scales_of_bfloat16_are_the_engines_exactly_where_the_layout_says_so() -> None:
    """Every bfloat16 between 2**-17 and 65504."""
    scales = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
    within = scales[(scales >= 2.0**-17) & (scales <= 65504)]
    # 33 powers of two from 2**-17 on, 128 numbers from each to the next; the last (65536) is beyond.
    assert len(within) == 33 * 128
    assert torch.equal(engine_scales(within), within)
    below = scales[(scales > 0) & (scales < 2.0**-17)]
    # There float16 has the multiples of 2**-24.
    assert ((engine_scales(below) - below).abs() <= 2.0**-25).all()


def test_a_rank_reads_the_bytes_of_its_rows_alone(slim: Path) -> None:
    with CheckpointReader(slim) as reader:
        format = reader.format_of(f"{DOWN}.weight")
        assert format is not None
        whole, weight = reader.parts(f"{DOWN}.weight"), f"{DOWN}.weight"
        rows, columns = whole[""].shape
        for first, last, bytes_of_rows in ((0, rows // 2, rows // 4), (2, 7, 3), (3, 4, 1), (rows - 5, rows, 3)):
            before = reader.bytes_read
            part = reader.part(weight, format.parts[0], slice(first, last), slice(32, columns))
            assert torch.equal(part, whole[""][first:last, 32:])
            assert reader.bytes_read - before == bytes_of_rows * (columns - 32)
            scales = reader.part(weight, format.parts[1], slice(first, last), slice(1, None))
            assert torch.equal(scales, whole["_scale"][first:last, 1:])


def test_biases_of_sixteenths_are_those_of_the_columns_that_ranks_share() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-8, 8, (6, 128), dtype=torch.int8, generator=generator)
    # Powers of two: sums are exact in any order.
    scale = 2.0 ** torch.randint(-6, 0, (6, 4), generator=generator)
    floats = (weight.float().unflatten(1, (4, -1)) * scale[..., None]).flatten(1)
    parts = {"": weight, "_scale": scale}
    assert torch.equal(scale_bias("model.layers.0.self_attn.q_proj.weight", parts), 8 * floats.sum(1, keepdim=True))
    for name in (f"{DOWN}.weight", "model.layers.0.self_attn.o_proj.weight", "block_sparse_moe.experts.0.w2.weight"):
        bias = scale_bias(name, parts)
        assert bias.shape == (6, SIXTEENTHS)
        for ranks in (1, 2, 4, 16):
            of_ranks = bias.unflatten(1, (ranks, -1)).sum(-1)
            assert torch.equal(of_ranks, 8 * floats.unflatten(1, (ranks, -1)).sum(-1))


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("w4a8", {"group_size": -1}, "outside routed experts in groups only"),
        ("w4a8", {"group_size": 64, "attention": "mxfp8"}, "one group size, not 32 and 64"),
        ("w4a16", {"group_size": -1, "attention": "none"}, "w4a16 in groups only"),
        ("w8a8", {"attention": "w4a16"}, "w4a16 in routed experts only"),
    ],
)
def test_what_vllm_ascend_would_not_read_is_refused_before_anything_is_written(
    format: str, options: dict[str, Any], words: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        quantize_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path, format, layout="msmodelslim", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "columns", "size", "words"),
    [(3, 32, 1.0, "3 rows"), (4, 24, 1.0, "rows of 24"), (4, 32, 1e6, "above 65504")],
)
def test_a_matrix_that_does_not_fit_is_named(rows: int, columns: int, size: float, words: str, tmp_path: Path) -> None:
    source, name = tmp_path / "source", f"{DOWN}.weight"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({name: torch.full((rows, columns), size)}, source / "model.safetensors")
    group_size = 32 if size > 1 else -1
    with pytest.raises(ConfigError, match=f"{DOWN}.weight can't be stored as W4A8_DYNAMIC: .*{words}"):
        quantize_checkpoint(
            source, tmp_path / "out", "w4a8", layout="msmodelslim", group_size=group_size, attention="none"
        )


def test_converted_checkpoints_keep_compressed_tensors_layout(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}
    (source / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(ConfigError, match="leave out --layout"):
        quantize_checkpoint(source, tmp_path / "out", "w4a16", layout="msmodelslim")


def test_a_missing_second_scale_is_named_and_the_default_group_is_vllm_ascends(slim: Path, tmp_path: Path) -> None:
    described = json.loads((slim / ModelSlimFormats.file_name).read_text())
    tensors = load_file(slim / "model.safetensors")
    del tensors[f"{DOWN}.weight_scale_second"], described["group_size"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / ModelSlimFormats.file_name).write_text(json.dumps(described))
    with CheckpointReader(tmp_path) as reader:
        # w4a8.py of vllm-ascend 0.23.0: quant_description.get("group_size", 256).
        other = reader.format_of(f"{DOWN.replace('experts.3', 'experts.2')}.weight")
        assert other is not None
        assert other.group_size == 256
        with pytest.raises(ConfigError, match=f"has no {DOWN}.weight_scale_second"):
            reader.format_of(f"{DOWN}.weight")
