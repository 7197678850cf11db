"""A quantized checkpoint in the trainer: each rank reads and holds its part of every format, and cuts none apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.model.formats import check_format_layout, stored_formats
from qerl_rl.quant.checkpoint import CheckpointReader
from tests.model import harness
from tests.quant.converted import as_from_awq
from tests.ranks import RankPool

LAYOUTS = {
    "TP2 ETP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
    "EP2": TrainConfig(expert_parallel=2),
    "PP2": TrainConfig(pipeline_parallel=2),
}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A8": ("w8a8", {}),
    "W4A16": ("w4a16", {"group_size": 32}),
    "W4A8 experts, W8A8 attention": ("w4a8", {"group_size": 32, "attention": "w8a8"}),
    "NVFP4, layer 1 unquantized": ("nvfp4", {"keep_layers": (1,)}),
    "MXFP4 experts": ("mxfp4", {"attention": "none"}),
    "MXFP8": ("mxfp8", {}),
    "MXFP4 as msmodelslim describes it": ("mxfp4", {"layout": "msmodelslim"}),
    "W4A8 as msmodelslim describes it": ("w4a8", {"layout": "msmodelslim", "group_size": 32}),
}
AWQ = "W4A16 with zero points"
SIZES = {"layers": 2, "shared_expert_width": 64}
LORA = LoraConfig(rank=4, alpha=8.0)


def _held(folder: Path, train: TrainConfig) -> dict[str, Any]:
    """Names whose dequantized weights are not those of the checkpoint, the bytes read, the loss and the gradients."""
    harness.start(train)
    from qerl_rl.model.weight_map import export_hf

    loaded = harness.load(folder, train, LORA)
    read = loaded.reader.bytes_read
    harness.set_random_adapters(loaded)
    exported = dict(export_hf(loaded.model, loaded.architecture))
    unequal = [name for name, tensor in exported.items() if not torch.equal(tensor, loaded.reader.weight(name))]
    loss = harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
    gradients = {name: tensor.numpy() for name, tensor in harness.summed_gradients(loaded).items()}
    return {"names": len(exported), "unequal": unequal, "read": read, "loss": loss, "gradients": gradients}


def _held_in_all(folders: dict[str, Path], layouts: dict[str, TrainConfig]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(name, layout): _held(folders[name], train) for layout, train in layouts.items() for name in folders}


@pytest.fixture(scope="module")
def folders(
    tiny_checkpoint: Callable[..., Path],
    tiny_quantized: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    source = tiny_checkpoint("qwen2_moe", **SIZES)
    found = {name: tiny_quantized(source, format, **options) for name, (format, options) in FORMATS.items()}
    return found | {AWQ: as_from_awq(found["W4A16"], source, tmp_path_factory.mktemp("asymmetric"))}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], one_rank: RankPool) -> dict[tuple[str, str], dict[str, Any]]:
    return one_rank(_held_in_all, folders, {"one rank": TrainConfig()})[0]


@pytest.fixture(scope="module")
def split(folders: dict[str, Path], two_ranks: RankPool) -> list[dict[tuple[str, str], dict[str, Any]]]:
    return two_ranks(_held_in_all, folders, LAYOUTS)


@pytest.mark.parametrize("format", [*FORMATS, AWQ])
def test_every_layout_holds_the_weights_of_the_checkpoint_bit_for_bit(format: str, alone: Any, split: Any) -> None:
    assert alone[format, "one rank"]["unequal"] == []
    for layout in LAYOUTS:
        first, second = (rank[format, layout] for rank in split)
        assert (first["unequal"], first["names"]) == ([], alone[format, "one rank"]["names"])
        assert second["names"] == 0


@pytest.mark.parametrize("format", [*FORMATS, AWQ])
def test_every_layout_gives_the_loss_and_gradients_of_one_rank(format: str, alone: Any, split: Any) -> None:
    expected = alone[format, "one rank"]
    for layout in LAYOUTS:
        first, second = (rank[format, layout] for rank in split)
        assert max(first["loss"], second["loss"]) == pytest.approx(expected["loss"], rel=1e-6)
        for name, gradient in expected["gradients"].items():
            difference = abs(first["gradients"][name] - gradient).max()
            assert abs(gradient).max() > 0
            assert difference <= 2e-5 * abs(gradient).max(), f"{layout}: {name}"


def _stored_bytes(folder: Path) -> tuple[int, int, int]:
    """Bytes of the routed experts' parts, of the other layers' tensors that are split, and of the rest."""
    experts, split, rest = 0, 0, 0
    with CheckpointReader(folder) as reader:
        for name in reader:
            size = reader.get(name).nbytes
            if name.endswith("_shape"):
                continue
            if ".experts." in name:
                experts += size
            elif "_proj." in name or "embed_tokens" in name:
                split += size
            else:
                rest += size
    return experts, split, rest


def test_a_rank_reads_its_own_experts_bytes_and_its_own_rows_and_columns(
    folders: dict[str, Path], alone: Any, split: Any
) -> None:
    # In groups of 32 every part is cut in two; W8A8's scales of rows and NVFP4's of matrices are not.
    for name in ("W4A16", "MXFP8"):
        experts, matrices, rest = _stored_bytes(folders[name])
        assert alone[name, "one rank"]["read"] == experts + matrices + rest
        for rank in split:
            assert rank[name, "EP2"]["read"] == experts // 2 + matrices + rest
            assert rank[name, "TP2 ETP2"]["read"] == experts // 2 + matrices // 2 + rest


def _architecture(folder: Path) -> MoeArchitecture:
    return MoeArchitecture.from_folder(folder)


def test_a_layout_that_cuts_a_group_apart_is_refused_with_the_key_and_the_group(
    tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]
) -> None:
    folder = tiny_quantized(tiny_checkpoint("qwen2_moe", **SIZES), "w4a16", group_size=64)
    with CheckpointReader(folder) as reader:
        formats = stored_formats(reader, _architecture(folder))
    check_format_layout(_architecture(folder), formats, ParallelSizes(pipeline=2, expert=4))
    for sizes, key, columns in (
        (ParallelSizes(expert_tensor=2), "expert_tensor_parallel=2", "the 64 columns"),
        (ParallelSizes(tensor=4), "train.tensor_parallel=4", "the 128 columns"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_format_layout(_architecture(folder), formats, sizes)
        assert key in caught.value.problem
        assert columns in caught.value.problem
        assert "groups of 64" in caught.value.problem
        assert "smaller groups" in caught.value.fix
    assert "to 1 or 2" in caught.value.fix


def test_weights_that_the_model_fuses_must_be_stored_alike(
    tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_quantized(tiny_checkpoint("qwen2_moe", **SIZES), "w8a8")
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    other = json.loads(json.dumps(groups["group_0"])) | {"targets": [r"re:.*layers\.1\..*experts\.3\..*"]}
    other["weights"]["num_bits"] = 4
    config["quantization_config"]["config_groups"] = {"group_1": other, **groups}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with CheckpointReader(tmp_path) as reader, pytest.raises(ConfigError) as caught:
        stored_formats(reader, _architecture(tmp_path))
    assert "layers.1.mlp.experts.3.gate_proj.weight as w4a8" in caught.value.problem
    assert "experts of a layer alike" in caught.value.fix
