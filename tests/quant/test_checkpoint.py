"""Checkpoints are read lazily and quantized tensor by tensor, and what can't be used is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant import w8a8
from qerl_rl.quant.checkpoint import INDEX_NAME, CheckpointReader
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.quant.library import linear_modules

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")
NEVER_QUANTIZED = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "gate.weight", "bias")


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_twin_equals_the_source_name_by_name(
    family: str, tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path]
) -> None:
    source = load_file(tiny_checkpoint(family, "bfloat16") / "model.safetensors")
    twin = CheckpointReader(tiny_w8a8(family, "bfloat16"))
    quantized_names = {name for name in source if twin.is_quantized(name)}
    assert set(twin.names()) == set(source) | {f"{name}_scale" for name in quantized_names}
    for name, weight in source.items():
        if name in quantized_names:
            expected, scale = w8a8.quantize(weight)
            assert torch.equal(twin.get(name), expected)
            assert torch.equal(twin.get(f"{name}_scale"), scale)
        else:
            assert name.endswith(NEVER_QUANTIZED) or "shared_expert_gate" in name
            assert twin.get(name).dtype == weight.dtype
            assert torch.equal(twin.get(name), weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignore_list_leaves_exactly_the_modules_without_scales_unquantized(
    family: str, tiny_w8a8: Callable[..., Path]
) -> None:
    """The library's own matching on the model's Linear modules, built as in vLLM: one Linear for each expert matrix."""
    reader = CheckpointReader(tiny_w8a8(family))
    config = QuantizationConfig.model_validate(
        json.loads((reader.path / "config.json").read_text())["quantization_config"]
    )
    names = [
        name for name in reader if len(reader.shape(name)) == 2 and not name.endswith(("_scale", "embed_tokens.weight"))
    ]
    linears = linear_modules(names)
    matched = {name for name, _ in match_named_modules(linears, config.config_groups["group_0"].targets, config.ignore)}
    assert matched == {name.removesuffix(".weight") for name in names if reader.is_quantized(name)}


@pytest.mark.parametrize("shard_bytes", [1, 40_000])
def test_many_shards_hold_what_one_file_holds(
    shard_bytes: int, tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path], tmp_path: Path
) -> None:
    written = quantize_checkpoint(tiny_checkpoint("mixtral"), tmp_path, "w8a8", shard_bytes=shard_bytes).weight_bytes
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    sharded, whole = CheckpointReader(tmp_path), CheckpointReader(tiny_w8a8("mixtral"))
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == set(sharded.names()) == set(whole.names())
    assert all(torch.equal(sharded.get(name), whole.get(name)) for name in whole)
    assert index["metadata"]["total_size"] == written == sum(whole.get(name).nbytes for name in whole)
    # A sharded checkpoint is also a source, and writing again leaves no stale shard behind.
    quantize_checkpoint(tiny_checkpoint("mixtral"), tmp_path, "w8a8")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / INDEX_NAME).exists()


def test_reads_a_sharded_source(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert (tmp_path / "sharded" / INDEX_NAME).exists()
    one, many = CheckpointReader(folder), CheckpointReader(tmp_path / "sharded")
    assert one.names() == many.names()
    assert all(torch.equal(one.get(name), many.get(name)) for name in one)
    assert many.shape("lm_head.weight") == tuple(one.get("lm_head.weight").shape)


def test_tokenizer_and_generation_config_come_along(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("qwen3_moe")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "12+34=46 Abc\n~"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3_moe"


def refused(source: Path, out: Path, format: str = "w8a8") -> str:
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(source, out, format)
    assert caught.value.fix
    return str(caught.value)


def test_unusable_sources_are_config_errors(
    tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    good = tiny_checkpoint("mixtral")
    assert "does not exist" in refused(tmp_path / "nowhere", out)
    assert "quantized already" in refused(tiny_w8a8("mixtral"), out)
    assert "w8a8" in refused(good, out, "int3")
    assert "itself" in refused(good, good)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no .safetensors" in refused(empty, out)

    broken = Path(shutil.copytree(good, tmp_path / "broken"))
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "model.safetensors can't be read" in refused(broken, out)
    (broken / "model.safetensors").write_bytes(content)
    (broken / "config.json").write_text("{")
    assert "no JSON" in refused(broken, out)
    (broken / "config.json").unlink()
    assert "no config.json" in refused(broken, out)
    (broken / INDEX_NAME).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert "model-00001-of-00002.safetensors can't be read" in refused(broken, out)
    (broken / INDEX_NAME).write_text("{}")
    assert INDEX_NAME in refused(broken, out)


def test_a_name_that_is_not_there_is_a_key_error(tiny_checkpoint: Callable[..., Path]) -> None:
    with CheckpointReader(tiny_checkpoint("mixtral")) as reader:
        assert "nothing.weight" not in reader
        with pytest.raises(KeyError):
            reader.get("nothing.weight")
