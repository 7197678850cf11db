"""What moves to the rollout engine: the shards of any layout are pieces of the whole weights, rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import QuantConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.layout.slots import weight_slots
from qerl_rl.layout.tensors import Weights
from qerl_rl.layout.train import TrainLayout, coordinates
from qerl_rl.model.formats import rounded_formats
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.quantize import Recipe, quantize_checkpoint, recipe_of
from tests.train.models import make_config, make_samples, policy_gradient, share, start_engine

LAYOUTS = {
    "data 2": {},
    "tensor 2, experts too": {"tensor_parallel": 2, "expert_tensor_parallel": 2},
    "expert 2": {"expert_parallel": 2},
    "pipeline 2": {"pipeline_parallel": 2},
    "tensor 2, expert 2 in bfloat16": {"tensor_parallel": 2, "expert_parallel": 2, "dtype": "bfloat16"},
}
FORMATS = {
    "w8a8": QuantConfig("w8a8"),
    "w4a16 in groups of 32": QuantConfig("w4a16", group_size=32),
    "w4a16, whole rows": QuantConfig("w4a16", group_size=-1),
    "nvfp4": QuantConfig("nvfp4"),
    "mxfp8": QuantConfig("mxfp8"),
    "bfloat16": QuantConfig("none"),
}
SIZES = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "expert_width": 64, "shared_expert_width": 64}


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A model with shared experts, biases and tied embeddings."""
    return tiny_checkpoint("qwen2_moe", **SIZES)


def train_and_read(path: str, layouts: dict[str, dict], folder: str) -> dict[str, Any]:
    """By layout, of an engine after an update: what its source gives in each format, and where this rank stands.

    The trained model itself, unsharded, goes to a folder of the layout's name.
    """
    found = {}
    for number, (layout, settings) in enumerate(layouts.items()):
        engine = start_engine(make_config({"none": path}, quant="none", rank=0, workers=2, **settings))
        own = share(make_samples(), engine.data_parallel_rank, engine.data_parallel_size)
        engine.update(own, policy_gradient)
        from qerl_rl.model.parallel import current_coordinates
        from qerl_rl.model.weight_map import export_hf

        shards, config = {}, engine.config
        for name, quant in FORMATS.items():
            engine.config = dataclasses.replace(config, quant=quant)
            shards[name] = read_all(engine)
        exported = dict(export_hf(engine.model, engine.architecture))
        if exported:
            target = Path(folder, str(number))
            target.mkdir()
            save_file(exported, target / "model.safetensors", metadata={"format": "pt"})
            (target / "config.json").write_text((Path(path) / "config.json").read_text())
        found[layout] = {"at": current_coordinates(), "shards": shards}
    return found


def read_all(engine: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(type, shape, bytes) of each local tensor; every tensor is read twice and then finished."""
    ended: list[str] = []
    source = engine.weight_source(lambda name, parameter: ended.append(name))
    names, found = source.names, {}
    for name in names:
        first, again = source.read(name), source.read(name)
        assert torch.equal(first.view(-1).view(torch.uint8), again.view(-1).view(torch.uint8))
        found[name] = (
            str(first.dtype),
            tuple(first.shape),
            first.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
        source.finished(name)
        with pytest.raises(KeyError):
            source.read(name)
    parameters = [name for name, _ in engine.model.named_parameters()]
    assert sorted(ended) == sorted(parameters)
    return found


@pytest.fixture(scope="module")
def read(two_ranks, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    folder = tmp_path_factory.mktemp("trained")
    return two_ranks(train_and_read, str(source), LAYOUTS, str(folder)), folder


def sizes_of(layout: str) -> ParallelSizes:
    keys = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel")
    return ParallelSizes(*(LAYOUTS[layout].get(key, 1) for key in keys))


def put_together(ranks: list[dict], layout: str, name: str, architecture: MoeArchitecture) -> dict[str, torch.Tensor]:
    """The whole tensors, by the names of a checkpoint's parts in memory; replicas must agree."""
    sizes = sizes_of(layout)
    formats = rounded_formats(architecture, recipe_of(FORMATS[name]))
    whole: dict[str, torch.Tensor] = {}
    for slot in weight_slots(architecture, sizes):
        format = formats.get((slot.layer, slot.name))
        for part in format.parts if format else (None,):
            of_part, suffix = (slot.part(part), part.suffix) if part else (slot, "")
            full: torch.Tensor | None = None
            for rank in ranks:
                at: Coordinates = rank[layout]["at"]
                if slot.stage(architecture.layers, sizes) != at.pipeline:
                    continue
                path = slot.module_path(architecture.layers, sizes) + suffix
                kind, shape, data = rank[layout]["shards"][name][path]
                local = torch.frombuffer(bytearray(data), dtype=getattr(torch, kind.removeprefix("torch.")))
                assert shape == tuple(local.shape) or len(shape) > 1
                if full is None:
                    full = torch.zeros(of_part.block.shape, dtype=local.dtype)
                    held = torch.zeros(of_part.block.shape, dtype=torch.bool)
                index = of_part.block.part(sizes, at)
                local = local.view(of_part.block.part_shape(sizes, at))
                assert same(torch.where(held[index], full[index].float(), local.float()), local.float())
                full[index], held[index] = local, True
            assert full is not None
            assert held.all()
            for piece in of_part.pieces:
                found = full[piece.index].reshape(piece.shape)
                # A tied embedding lies on the first and on the last pipeline stage.
                assert same(whole.setdefault(piece.name + suffix, found), found)
    return whole


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_shapes_are_those_of_the_layout_that_plans_are_made_of(
    read, source: Path, layout: str, name: str
) -> None:
    ranks, _ = read
    architecture = MoeArchitecture.from_folder(source)
    weights = Weights(rounded_formats(architecture, recipe_of(FORMATS[name])))
    planned = TrainLayout(architecture, sizes_of(layout), 2, weights)
    for number, rank in enumerate(ranks):
        shapes = {local: shape for local, (_, shape, _) in rank[layout]["shards"][name].items()}
        assert shapes == planned.local_shapes(number)
        assert coordinates(number, sizes_of(layout), 2) == rank[layout]["at"]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in type, shape and every bit."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_put_together_are_the_whole_trained_weights_rounded(
    read, tmp_path: Path, layout: str, name: str
) -> None:
    ranks, folder = read
    trained, quant = folder / str([*LAYOUTS].index(layout)), FORMATS[name]
    found = put_together(ranks, layout, name, MoeArchitecture.from_folder(trained))
    if quant.format != "none":
        quantize_checkpoint(trained, tmp_path, quant.format, group_size=quant.group_size)
    with CheckpointReader(tmp_path if quant.format != "none" else trained) as reader:
        expected = {}
        for weight in reader.weights():
            format = reader.format_of(weight)
            parts = reader.parts(weight) if format else {"": reader.get(weight).to(torch.bfloat16)}
            expected |= {weight + suffix: tensor for suffix, tensor in parts.items()}
    assert found.keys() == expected.keys()
    assert [key for key, tensor in expected.items() if not same(found[key], tensor)] == []


def test_training_moved_what_is_compared(read, source: Path) -> None:
    """Shards of the first weights would pass for those of the trained ones otherwise."""
    _, folder = read
    with CheckpointReader(source) as before, CheckpointReader(folder / "0") as after:
        unmoved = [name for name in before.weights() if torch.equal(before.get(name), after.get(name))]
    assert unmoved == []


def read_adapters(paths: dict[str, str]) -> dict[str, Any]:
    engine = start_engine(make_config(paths))
    try:
        engine.weight_source()
        refused = ""
    except ValueError as error:
        refused = str(error)
    source = engine.adapter_source()
    own = dict(engine.model.named_parameters())
    return {
        "names": set(source.names) == {name for name in own if "_lora_" in name},
        "in place": all(source.read(name).data_ptr() == own[name].data_ptr() for name in source.names),
        "refused": refused,
    }


def test_adapters_move_as_they_lie_in_the_model(one_rank, checkpoints) -> None:
    [found] = one_rank(read_adapters, checkpoints)
    assert found["names"]
    assert found["in place"]
    assert "lora.rank=0" in found["refused"]


def test_groups_that_do_not_fit_the_model_are_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"q_proj\.weight can't be rounded to w4a16 in groups of 128") as error:
        rounded_formats(MoeArchitecture.from_folder(source), Recipe("w4a16"))
    assert "quant.group_size" in error.value.fix
