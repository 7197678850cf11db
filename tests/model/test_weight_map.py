"""HF -> Megatron -> HF is the identity in every layout, and a checkpoint that does not fit says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.quant.formats import get_format
from tests.model import harness
from tests.ranks import RankPool

LAYOUTS = {
    "TP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
    "EP2": TrainConfig(expert_parallel=2),
    "PP2": TrainConfig(pipeline_parallel=2),
    "TP2 EP2": TrainConfig(tensor_parallel=2, expert_parallel=2),
}
DTYPES = ("float32", "bfloat16")


def _differences(folder: Path, train: TrainConfig, lora: LoraConfig | None) -> list[str]:
    """Names of tensors that the export lacks, adds or changes."""
    harness.start(train)
    from qerl_rl.model.weight_map import export_hf

    loaded = harness.load(folder, train, lora)
    exported = dict(export_hf(loaded.model, loaded.architecture))
    if torch.distributed.get_rank() > 0:
        return sorted(exported)
    unequal = {
        name for name in exported.keys() & loaded.reader if not _identical(exported[name], loaded.reader.get(name))
    }
    return sorted(unequal | (exported.keys() ^ set(loaded.reader)))


def _identical(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def _all_differences(folders: dict[str, Path], layouts: dict[str, TrainConfig]) -> dict[str, list[str]]:
    found = {}
    for name, layout in layouts.items():
        for case, folder in folders.items():
            dtype = json.loads((folder / "config.json").read_text())["dtype"]
            train = TrainConfig(**{**vars(layout), "dtype": dtype})
            # With adapters the base goes through this project's linear layers, without through Megatron's.
            for lora in (None, LoraConfig(rank=2)):
                found[f"{case}, {name}, {lora}"] = _differences(folder, train, lora)
    return found


def _odd_vocabulary(source: Path, folder: Path) -> Path:
    """A copy whose vocabulary has one token less, so that two tensor-parallel ranks can't halve it."""
    tensors = load_file(source / "model.safetensors")
    rows = tensors["lm_head.weight"].size(0) - 1
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    assert rows % 2
    return folder


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    families = ("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "phimoe", "minicpm")
    found = {f"{family} {dtype}": tiny_checkpoint(family, dtype, layers=2) for family in families for dtype in DTYPES}
    odd = _odd_vocabulary(tiny_checkpoint("qwen3_moe", layers=2), tmp_path_factory.mktemp("odd"))
    return found | {"odd vocabulary": odd}


def test_round_trip_on_one_rank_is_bit_exact(folders: dict[str, Path], one_rank: RankPool) -> None:
    [differences] = one_rank(_all_differences, folders, {"one rank": TrainConfig()})
    assert {case: names for case, names in differences.items() if names} == {}


def test_round_trip_over_two_ranks_is_bit_exact_and_arrives_on_rank_0(
    folders: dict[str, Path], two_ranks: RankPool
) -> None:
    differences, arrived_elsewhere = two_ranks(_all_differences, folders, LAYOUTS)
    assert {case: names for case, names in differences.items() if names} == {}
    assert not any(arrived_elsewhere.values())


def _padded_loss(folder: Path, layouts: list[TrainConfig]) -> list[tuple[float, float]]:
    """(loss, highest log-probability of padding) in each layout."""
    found = []
    for train in layouts:
        harness.start(train)
        loaded = harness.load(folder, train, LoraConfig(rank=2))
        tokens = harness.sequences(loaded.architecture.vocabulary_size)
        loss = harness.loss_and_gradients(loaded, tokens)
        with torch.no_grad():
            logits = loaded.model(**harness.packed(tokens))
        found.append((loss, float(logits[..., -1].max())))
    return found


def test_padding_of_the_vocabulary_has_no_probability(
    folders: dict[str, Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = folders["odd vocabulary"]
    expected, _ = one_rank(_padded_loss, folder, [TrainConfig()])[0][0]
    results = two_ranks(_padded_loss, folder, [LAYOUTS["TP2"]])
    assert results[1][0][1] < -1e29
    assert results[0][0][0] == pytest.approx(expected, rel=1e-6)


def _problems(folders: dict[str, Path]) -> dict[str, str]:
    found = {}
    for name, folder in folders.items():
        harness.start(TrainConfig())
        from qerl_rl.layout.architecture import MoeArchitecture
        from qerl_rl.model.build import build_model
        from qerl_rl.model.weight_map import load_hf
        from qerl_rl.quant.checkpoint import CheckpointReader

        architecture = MoeArchitecture.from_folder(folder)
        layers, weights = range(architecture.layers), ("mlp.experts.w13", "mlp.experts.w2")
        formats = {(layer, weight): get_format("w8a8") for layer in layers for weight in weights}
        model = build_model(architecture, TrainConfig(), None, formats if name == "not quantized" else {})
        try:
            load_hf(model, CheckpointReader(folder), architecture)
        except ConfigError as error:
            found[name] = str(error)
    return found


def _changed(source: Path, folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", folder / "config.json")
    return folder


def test_checkpoint_that_does_not_fit_is_refused_by_name(
    tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path], tmp_path: Path, one_rank: RankPool
) -> None:
    plain, name = tiny_checkpoint("mixtral", layers=2), "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    problems = one_rank(
        _problems,
        {
            "missing": _changed(plain, tmp_path / "missing", name, None),
            "shape": _changed(plain, tmp_path / "shape", name, torch.zeros(3, 5)),
            "quantized": tiny_w8a8("mixtral", layers=2),
            "not quantized": plain,
        },
    )[0]
    assert f"has no {name}" in problems["missing"]
    assert f"{name} has shape (3, 5)" in problems["shape"]
    assert "stored as w8a8" in problems["quantized"]
    assert "quant.format to w8a8" in problems["quantized"]
    assert "quant.format to none" in problems["not quantized"]
