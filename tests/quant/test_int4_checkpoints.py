"""AWQ and GPTQ checkpoints become W4A16 without a number changing: packed here by the formats' published rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qerl_rl.__main__ import main
from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader, stored_format
from qerl_rl.quant.int4 import W4A16Asymmetric
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.quant.library import library_decompress

ROWS, COLUMNS, GROUP = 16, 64, 32
NAME = "model.layers.0.mlp.experts.1.down_proj"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column that lies in each nibble of an int32 of AutoAWQ's gemm kernel, the lowest first."""


def packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values of 0 to 15 beside each other along the last dimension -> an int32, the lowest nibble first."""
    eights = values.long().unflatten(-1, (-1, 8))
    words = sum(eights[..., column] << (4 * nibble) for nibble, column in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def numbers(symmetric: bool, least_zero: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [N, K] and zero points [N, groups] of 0 to 15, scales [N, groups] float16."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (ROWS, COLUMNS), generator=generator)
    zeros = torch.randint(least_zero, 16, (ROWS, COLUMNS // GROUP), generator=generator)
    scales = torch.rand(ROWS, COLUMNS // GROUP, generator=generator).half() / 100
    return q, torch.full_like(zeros, 8) if symmetric else zeros, scales


def expected(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Both formats' definition, scale * (q - zero), which float16 rounds once."""
    return ((q - zeros.repeat_interleave(GROUP, 1)) * scales.double().repeat_interleave(GROUP, 1)).half()


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], described: dict) -> Path:
    folder.mkdir()
    others = {"model.embed_tokens.weight": torch.ones(4, 8).half(), "model.layers.0.mlp.gate.weight": torch.ones(2, 8)}
    module = {f"{NAME}{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file(others | module, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "quantization_config": described}))
    return folder


def awq(folder: Path, symmetric: bool) -> Path:
    q, zeros, scales = numbers(symmetric)
    tensors = {".qweight": packed(q.T, AWQ_ORDER), ".scales": scales.T.contiguous()}
    if not symmetric:
        tensors[".qzeros"] = packed(zeros.T, AWQ_ORDER)
    described = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": not symmetric, "version": "gemm"}
    return checkpoint(folder, tensors, described)


def gptq(folder: Path, symmetric: bool, version: int = 1, order: torch.Tensor | None = None) -> Path:
    q, zeros, scales = numbers(symmetric, least_zero=1)
    columns = torch.arange(COLUMNS, dtype=torch.int32)
    tensors = {
        ".qweight": packed(q).T,
        # What lies in a file of the first version is one less.
        ".qzeros": packed((zeros - int(version == 1)).T),
        ".scales": scales.T,
        ".g_idx": columns // GROUP if order is None else order,
    }
    described = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": symmetric, "desc_act": False}
    if version == 2:
        described["checkpoint_format"] = "gptq_v2"
    return checkpoint(folder, tensors, described)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq_v2"])
def test_converted_weights_are_the_same_numbers(kind: str, symmetric: bool, tmp_path: Path) -> None:
    build = {"awq": awq, "gptq": gptq, "gptq_v2": lambda folder, symmetric: gptq(folder, symmetric, version=2)}[kind]
    source = build(tmp_path / "source", symmetric)
    written = quantize_checkpoint(source, tmp_path / "out", "w4a16")
    assert (written.quantized, written.error) == (1, None)
    numbers_in = numbers(symmetric, least_zero=0 if kind == "awq" else 1)
    with CheckpointReader(tmp_path / "out") as reader:
        assert stored_format(tmp_path / "out") == "w4a16"
        assert reader.weights() == ["model.embed_tokens.weight", f"{NAME}.weight", "model.layers.0.mlp.gate.weight"]
        format = reader.format_of(f"{NAME}.weight")
        assert isinstance(format, W4A16Asymmetric) != symmetric
        assert (format.group_size, format.parts[1].dtype) == (GROUP, torch.float16)
        assert torch.equal(reader.weight(f"{NAME}.weight", torch.float16), expected(*numbers_in))
        if symmetric:
            stored = {name.removeprefix(f"{NAME}."): reader.get(name) for name in reader if name.startswith(NAME)}
            assert torch.equal(library_decompress(format, stored), expected(*numbers_in))
        assert reader.format_of("model.layers.0.mlp.gate.weight") is None


def test_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = awq(tmp_path / "source", symmetric=False)
    assert main(["quantize", "--model", str(source), "--out", str(tmp_path / "out"), "--format", "w4a16"]) == 0
    assert "1 matrices in w4a16" in (told := capsys.readouterr().out)
    assert "converted exactly" in told


def test_asymmetric_layout_is_the_librarys() -> None:
    from compressed_tensors.compressors.base import BaseCompressor

    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)) + 0.5
    format = W4A16Asymmetric(32)
    parts = format.quantize(weight)
    stored = {f"weight{suffix}": tensor for suffix, tensor in format.stored(parts).items()}
    compressor, scheme = BaseCompressor.get_value_from_registry("pack-quantized"), format.scheme()
    state = {"weight": weight, "weight_scale": parts["_scale"], "weight_zero_point": parts["_zero_point"]}
    theirs = compressor.compress(state, scheme)
    assert set(theirs) == set(stored)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stored.items())
    back = compressor.decompress(dict(theirs), scheme)["weight"]
    loaded = format.loaded(format.stored(parts))
    assert torch.equal(format.dequantize(loaded, back.dtype), back)
    assert torch.equal(loaded["_zero_point"], parts["_zero_point"])


def test_what_can_not_be_converted_is_said(tmp_path: Path) -> None:
    shuffled = torch.arange(COLUMNS, dtype=torch.int32).flip(0) // GROUP
    source = gptq(tmp_path / "order", symmetric=True, order=shuffled)
    with pytest.raises(ConfigError, match="order of their activations"):
        quantize_checkpoint(source, tmp_path / "out", "w4a16")
    plain = awq(tmp_path / "awq", symmetric=False)
    with pytest.raises(ConfigError, match="use --format w4a16"):
        quantize_checkpoint(plain, tmp_path / "out", "w8a8")
    with pytest.raises(ConfigError, match="converted as it is"):
        quantize_checkpoint(plain, tmp_path / "out", "w4a16", keep_layers={0})
    with pytest.raises(ConfigError, match="stored as 'awq'"):
        stored_format(plain)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="8 bits"):
        quantize_checkpoint(plain, tmp_path / "out", "w4a16")
    wrong = gptq(tmp_path / "wrong", symmetric=False)
    config = json.loads((wrong / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (wrong / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="described as symmetric"):
        quantize_checkpoint(wrong, tmp_path / "out", "w4a16")
