"""Checkpoints with the experts of a layer in one tensor are read as those with one tensor an expert."""

from __future__ import annotations

import filecmp
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.families import FAMILIES
from qerl_rl.layout.fused_experts import CONVENTIONS, find_places
from qerl_rl.quant.checkpoint import CheckpointReader, ShardWriter
from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.quant.fused import turned, written

FUSED_FAMILIES = [family for family in FAMILIES if family != "minicpm"]
"""MiniCPM-MoE has no class in transformers that would save it so."""
BLOCK = "model.layers.1.mlp.experts."
GATE_UP, DOWN = f"{BLOCK}gate_up_proj", f"{BLOCK}down_proj"
NOT_SQUARE = {"layers": 2, "expert_width": 96}
"""2 * 96 is not the hidden size, 128."""


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_what_transformers_saves_fused_reads_as_what_it_saves_one_by_one(
    family: str, tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path]
) -> None:
    source = tiny_checkpoint(family, "bfloat16", layers=2)
    with CheckpointReader(source) as plain, CheckpointReader(tiny_fused(source)) as reader:
        assert reader.has_fused_experts
        assert not plain.has_fused_experts
        assert reader.names() == plain.names() == reader.weights()
        for name in plain:
            assert (reader.shape(name), reader.dtype(name)) == (plain.shape(name), plain.dtype(name))
            assert torch.equal(reader.get(name), plain.get(name)), name
        assert reader.bytes_read == plain.bytes_read


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("format", ["w8a8", "w4a16", "nvfp4"])
def test_a_fused_checkpoint_is_quantized_to_the_same_files(
    format: str, columns: bool, tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", **NOT_SQUARE)
    options = {"keep_layers": [0], "group_size": 32 if format == "w4a16" else 0, "shard_bytes": 1 << 18}
    expected = quantize_checkpoint(source, tmp_path / "plain", format, **options)
    found = quantize_checkpoint(tiny_fused(source, columns=columns), tmp_path / "fused", format, **options)
    assert (found.quantized, found.weight_bytes, found.error) == (
        expected.quantized,
        expected.weight_bytes,
        expected.error,
    )
    _same_files(tmp_path / "plain", tmp_path / "fused")
    assert len(list((tmp_path / "fused").glob("*.safetensors"))) > 2


def _same_files(expected: Path, found: Path) -> None:
    names = sorted(file.name for file in expected.iterdir())
    assert sorted(file.name for file in found.iterdir()) == names
    assert filecmp.cmpfiles(expected, found, names, shallow=False)[0] == names


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_published_names_are_written_where_transformers_has_its_own(
    family: str, tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint(family, "bfloat16", layers=2)
    for name, folder in {"plain": source, "slim": tiny_fused(source)}.items():
        quantize_checkpoint(folder, tmp_path / name, "w8a8", layout="msmodelslim")
    _same_files(tmp_path / "plain", tmp_path / "slim")


def test_files_may_part_a_layers_two_tensors(
    tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2_moe", "bfloat16", layers=2)
    writer = ShardWriter(tmp_path / "parted", shard_bytes=1)
    for name, tensor in load_file(tiny_fused(source) / "model.safetensors").items():
        writer.add(name, tensor)
    writer.finish()
    (tmp_path / "parted" / "config.json").write_text((source / "config.json").read_text())
    with CheckpointReader(tmp_path / "parted") as reader, CheckpointReader(source) as plain:
        assert len(reader.files()) > 20
        assert sorted(itertools.chain(*reader.files().values())) == plain.names()
        assert all(torch.equal(reader.get(name), plain.get(name)) for name in plain)
    quantize_checkpoint(tmp_path / "parted", tmp_path / "quantized", "w8a8")
    with CheckpointReader(tmp_path / "quantized") as reader:
        assert reader.weights() == plain.names()


class _Stored:
    """What safetensors gives as a slice of a file's tensor, counting the elements that are taken."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.taken = tensor, 0

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self._tensor[index]
        self.taken += found.numel()
        return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    experts=st.integers(1, 3), hidden=st.integers(1, 8), width=st.integers(1, 8), columns=st.booleans(), data=st.data()
)
def test_every_order_and_slice_is_the_experts_own(
    experts: int, hidden: int, width: int, columns: bool, data: st.DataObject
) -> None:
    """Also where hidden == width and hidden == 2 * width, for a model_type that has files of both orders."""
    gate, up = torch.arange(2 * experts * width * hidden).view(2, experts, width, hidden)
    down = -torch.arange(experts * hidden * width).view(experts, hidden, width)
    stored = {GATE_UP: torch.cat([gate, up], 1), DOWN: down}
    stored = {name: turned(tensor) if columns else tensor for name, tensor in stored.items()}
    places = _places(stored, model_type="qwen3_vl_moe", text_config={"hidden_size": hidden, "num_experts": experts})
    assert len(places) == 3 * experts
    for leaf, exact in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        expert = data.draw(st.integers(0, experts - 1))
        place = places[f"{BLOCK}{expert}.{leaf}.weight"]
        assert place.shape == tuple(exact[expert].shape)
        rows, some = (data.draw(st.slices(size)) for size in place.shape)
        rows, some = (slice(each.start, each.stop) for each in (rows, some))
        for index in ((), (rows,), (rows, some)):
            whole = _Stored(stored[place.tensor])
            found = place.read(whole, *index)
            assert torch.equal(found, exact[expert][index])
            assert whole.taken == found.numel()


def _places(stored: Mapping[str, torch.Tensor], **config: Any) -> dict[str, Any]:
    return find_places(stored, lambda name: ("BF16", tuple(stored[name].shape)), lambda: config, "folder")


def test_every_family_of_transformers_has_a_convention() -> None:
    assert set(FUSED_FAMILIES) <= set(CONVENTIONS)
    for family in FUSED_FAMILIES:
        assert CONVENTIONS[family].by_columns == (False,)


SIZES = {
    **{"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"first_k_dense_replace": 0, "intermediate_size_mlp": 24},
}
VISION = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}


def _model_of(family: str) -> Any:
    import transformers

    nested = family in ("qwen3_vl_moe", "qwen3_5_moe")
    sizes = {"text_config": SIZES, "vision_config": VISION | {"deepstack_visual_indexes": [0]}} if nested else SIZES
    config = transformers.CONFIG_MAPPING[family](**sizes)
    classes = transformers.AutoModelForImageTextToText if nested else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return classes.from_config(config)


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "glm4_moe", "olmoe"])
def test_other_families_read_as_transformers_saves_them_one_by_one(family: str, tmp_path: Path) -> None:
    model = _model_of(family)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    with CheckpointReader(tmp_path / "plain") as plain, CheckpointReader(tmp_path / "fused") as reader:
        assert reader.has_fused_experts
        experts = [name for name in plain if ".experts." in name]
        assert experts == [name for name in reader if ".experts." in name]
        assert all(torch.equal(reader.get(name), plain.get(name)) for name in experts)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl_moe", "llama4_text"])
def test_families_that_are_only_published_fused_compute_the_same(family: str, tmp_path: Path) -> None:
    """The matrices that are read give what the expert of transformers' own module does."""
    model, expert = _model_of(family), 2
    model.save_pretrained(tmp_path)
    inputs = torch.randn(5, 32)
    prefix, experts = next(found for found in model.named_modules() if re.search(r"layers\.1\.\w+\.experts$", found[0]))
    if family == "llama4_text":
        expected = experts(inputs.repeat(4, 1)).view(4, 5, 32)[expert]
    else:
        expected = experts(inputs, torch.full((5, 1), expert), torch.ones(5, 1))
    with CheckpointReader(tmp_path) as reader:
        assert reader.has_fused_experts
        gate, up, down = (reader.get(f"{prefix}.{expert}.{leaf}_proj.weight") for leaf in ("gate", "up", "down"))
    found = (torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)) @ down.T
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


def _without(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {other: tensor for other, tensor in tensors.items() if other != name}


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], dict[str, Any], list[str]]] = {
    "no down": (lambda found: _without(found, DOWN), {}, [GATE_UP, "no down_proj"]),
    "no gate and up": (lambda found: _without(found, GATE_UP), {}, [DOWN, "no gate_up_proj"]),
    "both ways": (
        lambda found: found | {f"{BLOCK}3.up_proj.weight": torch.zeros(96, 128)},
        {},
        ["stored twice", GATE_UP, f"{BLOCK}3.up_proj.weight"],
    ),
    "two names": (
        lambda found: found | {f"{DOWN}.weight": found[DOWN].clone()},
        {},
        ["stored twice", f"as {DOWN} and", f"{DOWN}.weight"],
    ),
    "two routers": (
        lambda found: found | {"model.layers.1.block_sparse_moe.gate.weight": torch.zeros(8, 128)},
        {"model_type": "mixtral"},
        ["stored twice", "block_sparse_moe.gate.weight", "mlp.gate.weight"],
    ),
    "one turned": (lambda found: found | {DOWN: turned(found[DOWN])}, {}, [DOWN, "[8, 96, 128]", "hidden_size=128"]),
    "two experts less": (lambda found: found | {DOWN: found[DOWN][:6].clone()}, {}, ["[6, 128, 96]", "8 experts"]),
    "a matrix": (lambda found: found | {GATE_UP: found[GATE_UP][0].clone()}, {}, ["[192, 128]", GATE_UP]),
    "another model's": (lambda found: found, {"num_local_experts": 16}, ["16 experts"]),
    "no hidden size": (lambda found: found, {"hidden_size": None}, ["hidden_size=None"]),
    "int8": (lambda found: found | {DOWN: found[DOWN].to(torch.int8)}, {}, [f"{DOWN} I8", "bfloat16"]),
    "scales": (lambda found: found | {f"{DOWN}_scale": torch.ones(8)}, {}, [f"{DOWN}_scale", "quantized"]),
    "biases": (lambda found: found | {f"{DOWN}_bias": torch.ones(8, 128)}, {}, [f"{DOWN}_bias", "biases"]),
    "unknown": (lambda found: found, {"model_type": "gpt_oss"}, ["gpt_oss", "save_original_format=True"]),
    "another block": (
        lambda found: {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in found.items()},
        {},
        ["block feed_forward", "not mlp"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_or_mixed_is_named(
    case: str, tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source, (change, config, said) = tiny_fused(tiny_checkpoint("qwen3_moe", "bfloat16", **NOT_SQUARE)), BROKEN[case]
    tensors = load_file(source / "model.safetensors")
    folder = written(tmp_path / "model", source, change(tensors), **config)
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(folder, tmp_path / "out", "w8a8")
    for part in said:
        assert part in str(caught.value)
    assert caught.value.where == str(folder)
    assert not list((tmp_path / "out").glob("*"))


def test_an_order_that_no_shape_proves_is_refused(
    tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path]
) -> None:
    """gate_up_proj is square where the hidden size is twice the width: only other files of the type tell its order."""
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2, hidden=128, expert_width=64)
    with pytest.raises(ConfigError, match=r"square.*lies by columns, unlike other files of model_type=qwen3_moe"):
        CheckpointReader(tiny_fused(source, columns=True))
    with CheckpointReader(tiny_fused(source)) as reader, CheckpointReader(source) as plain:
        assert torch.equal(reader.get(f"{BLOCK}5.up_proj.weight"), plain.get(f"{BLOCK}5.up_proj.weight"))


def test_layers_may_be_stored_differently(
    tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", **NOT_SQUARE)
    plain, other = (load_file(folder / "model.safetensors") for folder in (source, tiny_fused(source)))
    mixed = {name: tensor for name, tensor in plain.items() if not name.startswith(BLOCK)}
    folder = written(tmp_path / "mixed", source, mixed | {GATE_UP: other[GATE_UP], DOWN: other[DOWN]})
    with CheckpointReader(folder) as reader:
        assert reader.names() == sorted(plain)
        assert all(torch.equal(reader.get(name), plain[name]) for name in plain)


def test_a_fingerprint_sees_each_expert(
    tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_fused(tiny_checkpoint("qwen3_moe", "bfloat16", **NOT_SQUARE))
    tensors = load_file(source / "model.safetensors")
    folder = written(tmp_path / "copy", source, tensors)
    before = fingerprint(folder)
    tensors[DOWN][7, 0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before
