"""Checkpoints of every format: what is quantized and what is kept, mixed formats, memory, msmodelslim, the command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import match_named_modules
from safetensors.torch import load_file, save_file

from qerl_rl.__main__ import main
from qerl_rl.config.bounds import CHOICES
from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader, stored_format
from qerl_rl.quant.formats import FORMATS, get_format
from qerl_rl.quant.platforms import CONVERT, PLATFORMS, TABLE
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.quant.library import linear_modules

NEVER = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "gate.weight")
OPTIONS = {"w4a16": {"group_size": 32}, "w4a8": {"group_size": 32}}


def formats_by_the_library(folder: Path, names: list[str]) -> dict[str, tuple[int, str, bool]]:
    """(bits, type, quantized activations) of each module, by the library's own matching of groups and exceptions."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    found: dict[str, tuple[int, str, bool]] = {}
    for group in config.config_groups.values():
        for module, _ in match_named_modules(linear_modules(names), group.targets, config.ignore):
            assert module not in found
            found[module] = (group.weights.num_bits, str(group.weights.type), group.input_activations is not None)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_matrix_but_routers_embeddings_and_head_is_quantized(
    name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2_moe", "bfloat16", hidden=64, heads=2, kv_heads=1, expert_width=64)
    written = quantize_checkpoint(source, tmp_path, name, **OPTIONS.get(name, {}))
    assert stored_format(tmp_path) == name
    weights, twin = load_file(source / "model.safetensors"), CheckpointReader(tmp_path)
    assert twin.weights() == sorted(weights)
    for weight, exact in weights.items():
        format = twin.format_of(weight)
        if weight.endswith((*NEVER, ".bias")) or "shared_expert_gate" in weight:
            assert format is None
            assert torch.equal(twin.get(weight), exact)
        else:
            assert format is not None
            assert (format.name, format.group_size) == (name, get_format(name, **OPTIONS.get(name, {})).group_size)
            assert torch.equal(twin.weight(weight), format.dequantize(twin.parts(weight)))
            error = (twin.weight(weight) - exact.float()).norm() / exact.float().norm()
            assert error < (0.02 if name == "w8a8" else 0.05 if name == "mxfp8" else 0.2)
    quantized = {weight.removesuffix(".weight") for weight in weights if twin.is_quantized(weight)}
    linear = [weight for weight, tensor in weights.items() if tensor.dim() == 2 and "embed" not in weight]
    assert set(formats_by_the_library(tmp_path, linear)) == quantized
    assert written.quantized == len(quantized)
    assert written.weight_bytes == sum(twin.get(tensor).nbytes for tensor in twin)


def test_fused_matrices_share_one_global_scale(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16")
    quantize_checkpoint(source, tmp_path, "nvfp4")
    reader, exact = CheckpointReader(tmp_path), CheckpointReader(source)
    for stem, leaves in (("self_attn", "qkv"), ("mlp.experts.3", ("gate", "up"))):
        names = [f"model.layers.1.{stem}.{leaf}_proj.weight" for leaf in leaves]
        largest = max(exact.get(name).abs().max().float() for name in names)
        # NVFP4's definition: the largest magnitude becomes 6 (e2m1) times 448 (e4m3).
        for name in names:
            assert torch.equal(reader.get(f"{name}_global_scale"), (448.0 * 6.0 / largest).reshape(1))


@pytest.mark.parametrize("attention", ["none", "w8a8"])
def test_attention_and_kept_layers_have_a_format_of_their_own(
    attention: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen2_moe", "bfloat16", layers=3)
    quantize_checkpoint(source, tmp_path, "w4a16", group_size=32, attention=attention, keep_layers={1})
    reader = CheckpointReader(tmp_path)
    assert stored_format(tmp_path) == "w4a16"
    expected = {"w4a16": (4, "int", False), "w8a8": (8, "int", True)}
    linear = [name for name in reader.weights() if name.endswith("_proj.weight")]
    by_library = formats_by_the_library(tmp_path, linear)
    for name in linear:
        format = reader.format_of(name)
        wanted = "w4a16" if re.search(r"\.experts\.\d", name) else attention
        wanted = "none" if ".layers.1." in name else wanted
        assert (format.name if format else "none") == wanted, name
        assert by_library.get(name.removesuffix(".weight")) == expected.get(wanted), name


def memory(field: str) -> int:
    """VmRSS (resident now) or VmHWM (at most since the last reset), in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def growth(work: Callable[[], object]) -> int:
    """Bytes by which the process's resident memory rose at most while `work` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def test_memory_holds_one_shard_of_many(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Sixteen files of 8 MiB. Reading all of them takes 128 MiB (so the meter works); quantizing them a third of it."""
    source, mebi = tmp_path / "source", 1 << 20
    source.mkdir()
    (source / "config.json").write_text((tiny_checkpoint("qwen3_moe") / "config.json").read_text())
    weight_map = {}
    for shard in range(16):
        file_name = f"model-{shard + 1:05d}-of-00016.safetensors"
        experts = {
            f"model.layers.{shard}.mlp.experts.{expert}.up_proj.weight": torch.randn(1024, 1024).bfloat16()
            for expert in range(4)
        }
        save_file(experts, source / file_name)
        weight_map.update(dict.fromkeys(experts, file_name))
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = tmp_path / "out"
    quantize_checkpoint(tiny_checkpoint("qwen3_moe"), tmp_path / "warm_up", "w8a8")
    grown = growth(lambda: quantize_checkpoint(source, out, "w8a8", shard_bytes=8 * mebi))
    # A file of the source and one written (16), a matrix as floats, exact and dequantized, and its parts (11), the
    # rounding's blocks and what the allocator keeps.
    assert grown < 48 * mebi
    assert len(list(out.glob("*.safetensors"))) >= 8
    with CheckpointReader(source) as reader:
        everything = [reader.get(name) for name in reader]
        assert growth(lambda: [tensor.float().sum() for tensor in everything]) >= 100 * mebi


@pytest.mark.parametrize("name", ["w8a8", "mxfp8", "mxfp4"])
def test_modelslim_twin_reads_the_same(name: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16")
    quantize_checkpoint(source, tmp_path / "ours", name, attention="none" if name == "mxfp4" else "")
    quantize_checkpoint(
        source, tmp_path / "slim", name, layout="msmodelslim", attention="none" if name == "mxfp4" else ""
    )
    ours, slim = CheckpointReader(tmp_path / "ours"), CheckpointReader(tmp_path / "slim")
    assert stored_format(tmp_path / "slim") == name
    assert slim.weights() == ours.weights()
    for weight in ours.weights():
        assert torch.equal(slim.weight(weight), ours.weight(weight))
    described = json.loads((tmp_path / "slim" / "quant_model_description.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "slim" / "config.json").read_text())
    # vllm-ascend 0.23.0 looks every tensor up by its name, and makes these parameters (see modelslim.py).
    assert set(slim) <= set(described)
    expert = "model.layers.0.mlp.experts.0.up_proj.weight"
    expected = {
        "w8a8": ("W8A8_DYNAMIC", torch.int8, {"_scale": torch.float32, "_offset": torch.float32}),
        "mxfp8": ("W8A8_MXFP8", torch.float8_e4m3fn, {"_scale": torch.uint8}),
        "mxfp4": ("W4A16_MXFP4", torch.uint8, {"_scale": torch.uint8}),
    }[name]
    assert described[expert] == expected[0]
    assert described["model.layers.0.mlp.gate.weight"] == "FLOAT"
    assert slim.get(expert).dtype == expected[1]
    beside = {tensor.removeprefix(expert) for tensor in slim if tensor.startswith(f"{expert}_")}
    assert {suffix: slim.get(expert + suffix).dtype for suffix in beside} == expected[2]


def test_modelslim_refuses_what_it_has_no_layout_for(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout of nvfp4"):
        quantize_checkpoint(tiny_checkpoint("mixtral"), tmp_path, "nvfp4", layout="msmodelslim")
    (tmp_path / "quant_model_description.json").write_text('{"a.weight": "W4A4_FLATQUANT_DYNAMIC"}')
    save_file({"a.weight": torch.zeros(2, 2), "a.weight_scale": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="W4A4_FLATQUANT_DYNAMIC"):
        CheckpointReader(tmp_path).format_of("a.weight")


def test_what_does_not_fit_or_is_not_described_is_named(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_moe", expert_width=96)
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj\.weight can't be stored as w4a16: rows of 96"):
        quantize_checkpoint(source, tmp_path / "a", "w4a16", group_size=64, attention="none")
    quantize_checkpoint(source, tmp_path / "b", "w8a8")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*q_proj")
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has scales, but no format"):
        CheckpointReader(tmp_path / "b").format_of("model.layers.0.self_attn.q_proj.weight")


def test_command_says_what_it_wrote_and_what_is_wrong(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=3)
    call = ["quantize", "--model", str(source), "--out", str(tmp_path / "out"), "--format", "w4a16"]
    assert main([*call, "--group-size", "32", "--keep-first", "1", "--keep-layers", "2"]) == 0
    told = capsys.readouterr().out
    reader = CheckpointReader(tmp_path / "out")
    assert {name.split(".")[2] for name in reader.weights() if reader.is_quantized(name)} == {"1"}
    count = sum(reader.is_quantized(name) for name in reader.weights())
    assert f"{count} matrices in w4a16" in told
    assert float(re.search(r"relative error (0\.\d+)", told)[1]) == pytest.approx(0.095, abs=0.03)
    for wrong, words in (
        (["--group-size", "48"], "no groups of 48"),
        (["--keep-layers", "7"], "layers 0 to 2, not 7"),
        (["--keep-layers", "x"], "no list of numbers"),
        (["--calibrate", str(tmp_path / "none.jsonl")], "can't be read"),
        (["--layout", "msmodelslim"], "w4a16 in routed experts only"),
    ):
        assert main([*call, *wrong]) == 2
        assert words in capsys.readouterr().err


def test_calibration_without_its_package_names_it(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "1+1=2"}\n')
    call = ["quantize", "--model", str(tiny_checkpoint("qwen3_moe")), "--out", str(tmp_path / "out")]
    assert main([*call, "--format", "w8a8", "--calibrate", str(tmp_path / "text.jsonl")]) == 2
    assert "pip install llmcompressor" in capsys.readouterr().err


def test_table_says_for_every_platform_what_runs_each_format() -> None:
    assert set(TABLE) == {(format, platform) for format in CHOICES["quant.format"] for platform in PLATFORMS}
    for (format, platform), support in TABLE.items():
        assert (support.how == CONVERT) == bool(support.formats)
        for other in (*support.formats, *support.attention):
            assert TABLE[other, platform].how != CONVERT, (format, platform)
