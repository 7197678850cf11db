"""What the engine is given of a checkpoint, found from its files alone."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RolloutConfig
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import FORMATS
from qerl_rl.quant.quantize import quantize_checkpoint
from qerl_rl.rollout.limits import check_groups, check_scales_of_rows
from qerl_rl.rollout.load_plan import LoadPlan, local_tensors
from qerl_rl.rollout.loader import LOAD_FORMAT, loader_options
from tests.quant.converted import as_from_awq
from tests.quant.library import linear_modules


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`stored(format, ...)` -> folder of a quantized model of one layer; options of quantize_checkpoint."""

    def build(format: str, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(format)
        quantize_checkpoint(tiny_checkpoint("qwen3_moe", "bfloat16", layers=2), folder, format, **options)
        return folder

    return build


@pytest.mark.parametrize("format", ["w4a16", "w4a8"])
def test_int4_with_scales_of_whole_rows_is_dequantized(stored: Callable[..., Path], format: str) -> None:
    plan = LoadPlan(stored(format, group_size=-1), "cpu")
    assert plan.quantization_config() is None
    assert not any(plan.engine_format(name) for name in plan.names())


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_loaded_stands_for_the_same_weights(stored: Callable[..., Path], format: str) -> None:
    folder = stored(format, group_size=32 if format.startswith("w4") else 0)
    plan = LoadPlan(folder, "cpu")
    loaded = dict(local_tensors(plan, frozenset()))
    with CheckpointReader(folder) as reader:
        for name in reader.weights():
            run = plan.engine_format(name)
            if run is None:
                assert torch.equal(loaded[name], reader.weight(name, torch.bfloat16))
            else:
                parts = {part.suffix: loaded[name + part.suffix] for part in run.parts}
                assert torch.equal(run.dequantize(parts), reader.weight(name))
    described = plan.quantization_config()
    if format in ("nvfp4", "mxfp4", "mxfp8"):
        assert described is None
        assert "dequantized" in plan.line()
    else:
        assert described is not None
        # compressed-tensors' own reading of what vLLM is shown.
        from compressed_tensors.quantization import QuantizationConfig

        weights = QuantizationConfig.model_validate(described).config_groups["group_0"].weights
        assert weights.num_bits == (8 if format == "w8a8" else 4)
        assert described["format"] == ("int-quantized" if format == "w8a8" else "pack-quantized")


SLIM: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w4a8": {"group_size": 32},
    "w4a16": {"group_size": 32, "attention": "w8a8"},
    "mxfp4": {"attention": "none", "keep_layers": [1]},
}


@pytest.mark.parametrize("format", SLIM)
def test_a_checkpoint_that_msmodelslim_describes_is_shown_as_its_twin(stored: Callable[..., Path], format: str) -> None:
    plan = LoadPlan(stored(format, layout="msmodelslim", **SLIM[format]), "cpu")
    twin = LoadPlan(stored(format, **SLIM[format]), "cpu")
    assert plan.line() == twin.line()
    assert plan.names() == twin.names()
    assert not plan.is_native
    found, expected = (dict(local_tensors(each, frozenset())) for each in (plan, twin))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Scales of int4 groups are float32 here: the same numbers.
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
    modules = linear_modules([name for name in plan.names() if name.endswith("_proj.weight")])
    assert _groups_by_the_library(plan, modules) == _groups_by_the_library(twin, modules)
    assert "weight_offset" not in " ".join(found)


def _groups_by_the_library(plan: LoadPlan, modules: torch.nn.Module) -> dict[str, tuple[int, int | None, bool]]:
    """(bits, group size, quantized activations) of each module that the engine is shown as quantized."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules

    described = plan.quantization_config()
    config = QuantizationConfig.model_validate(described) if described else None
    return {
        name: (group.weights.num_bits, group.weights.group_size, group.input_activations is not None)
        for group in (config.config_groups.values() if config else ())
        for name, _ in match_named_modules(modules, group.targets, config.ignore)
    }


def test_a_mixed_checkpoint_shows_the_engine_what_it_runs_natively(stored: Callable[..., Path]) -> None:
    plan = LoadPlan(stored("mxfp4", attention="w8a8", keep_layers=[1]), "cpu")
    described = plan.quantization_config()
    assert described is not None
    assert [group["weights"]["num_bits"] for group in described["config_groups"].values()] == [8]
    runs = {name: plan.engine_format(name) for name in plan.names()}
    assert {name for name, run in runs.items() if run} == {
        f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkvo"
    }
    assert "mxfp4 (groups of 32): dequantized" in plan.line()
    assert "w8a8: native" in plan.line()


def test_ascend_is_told_the_group_size_where_its_engine_looks_for_it(stored: Callable[..., Path]) -> None:
    plan = LoadPlan(stored("w4a16", attention="w8a8", group_size=64), "910")
    config = SimpleNamespace(quantization_config={})
    loader_options(plan)["hf_overrides"](config)
    # The rest is as the checkpoint says; vllm-ascend would take groups of 32 without it.
    stored_config = json.loads((plan.reader.path / "config.json").read_text())["quantization_config"]
    assert config.quantization_config == stored_config | {"group_size": 64}
    assert loader_options(LoadPlan(stored("w8a8"), "910")) == {}


def test_a_group_that_targets_a_class_is_dequantized_beside_one_that_names_modules(
    stored: Callable[..., Path],
) -> None:
    folder = stored("mxfp4", attention="w8a8")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    (folder / "config.json").write_text(json.dumps(config))
    plan = LoadPlan(folder, "cpu")
    described = plan.quantization_config()
    assert described is not None
    assert list(described["config_groups"]) == ["group_1"]
    # vLLM refuses a module that no group targets, unless it is ignored.
    experts = {name.removesuffix(".weight") for name in plan.names() if ".experts." in name}
    assert experts
    assert experts <= set(described["ignore"])
    assert not [name for name in described["ignore"] if "self_attn" in name]


def test_int4_with_zero_points_is_dequantized(
    stored: Callable[..., Path], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2)
    plan = LoadPlan(as_from_awq(stored("w4a16", group_size=32), source, tmp_path), "cpu")
    assert plan.quantization_config() is None
    assert "w4a16 with zero points (groups of 32): dequantized" in plan.line()
    loaded = dict(local_tensors(plan, frozenset()))
    quantized = [name for name in plan.names() if plan.reader.is_quantized(name)]
    assert quantized
    for name in quantized:
        assert torch.equal(loaded[name], plan.reader.weight(name, torch.bfloat16))


@pytest.mark.parametrize("format", ["w8a8", "nvfp4"])
def test_a_float_checkpoint_is_rounded_as_quantize_writes_it(
    stored: Callable[..., Path], tiny_checkpoint: Callable[..., Path], format: str
) -> None:
    plan = LoadPlan(tiny_checkpoint("qwen3_moe", "bfloat16", layers=2), "cpu", quantize_to=format)
    twin = LoadPlan(stored(format), "cpu")
    assert plan.quantization_config() == twin.quantization_config()
    assert plan.line() == twin.line()
    assert plan.names() == twin.names()
    for name, tensor in local_tensors(twin, frozenset()):
        weight = name.partition(".weight")[0] + ".weight"
        assert torch.equal(plan.tensors(weight)[name], tensor)
        format_of_it = twin.engine_format(weight)
        if format_of_it and name == weight:
            rows, columns = slice(8, 24), slice(32, 64)
            part = plan.parts(weight, rows, columns)
            whole = format_of_it.dequantize(twin.parts(weight))[rows, columns]
            assert torch.equal(format_of_it.dequantize(part), whole)
        elif not format_of_it and twin.stored_format(weight):
            # Of groups of 16, which this begins and ends within.
            assert torch.equal(twin.floats(weight, slice(8, 24), slice(20, 50)), tensor[8:24, 20:50])


def test_what_is_quantized_already_is_not_rounded_again(stored: Callable[..., Path]) -> None:
    for layout in ("compressed-tensors", "msmodelslim"):
        with pytest.raises(ConfigError, match="checkpoint in bfloat16 or float32"):
            LoadPlan(stored("w8a8", layout=layout), "cpu", quantize_to="w4a16")


def test_foreign_modules_are_not_read(stored: Callable[..., Path]) -> None:
    plan = LoadPlan(stored("w4a16", group_size=32), "cpu")
    names = {name.removesuffix(".weight") for name in plan.names()}
    foreign = frozenset(name for name in names if ".experts." in name and name.split(".experts.")[1][0] != "3")
    kept = dict(local_tensors(plan, foreign))
    read = plan.reader.bytes_read
    assert not [name for name in kept if ".experts." in name and ".experts.3." not in name]
    everything = {name: plan.reader.get(name).nbytes for name in plan.reader}
    expected = sum(count for name, count in everything.items() if name.rpartition(".")[0] not in foreign)
    # The shape of a weight follows from its parts: it is written anew, not read.
    assert read == expected - sum(everything[name] for name in kept if name.endswith("_shape"))


def test_fused_experts_reach_every_engine_one_by_one_and_only_its_own_are_read(
    tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path]
) -> None:
    source = tiny_checkpoint("mixtral", "bfloat16", layers=2)
    expected = dict(local_tensors(LoadPlan(source, "cpu"), frozenset()))
    assert loader_options(LoadPlan(source, "910")) == {}
    for platform in ("cpu", "cuda", "910", "a5"):
        plan = LoadPlan(tiny_fused(source), platform)
        # vLLM's own loader would give its model the tensors as they lie in the file.
        assert loader_options(plan)["load_format"] == LOAD_FORMAT
        foreign = frozenset(name.removesuffix(".weight") for name in expected if re.search(r"experts\.[1-7]\.", name))
        loaded = dict(local_tensors(plan, foreign))
        assert loaded.keys() == {name for name in expected if name.removesuffix(".weight") not in foreign}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
        assert plan.reader.bytes_read == sum(tensor.nbytes for tensor in loaded.values())


def test_a_platform_without_a_kernel_says_what_to_quantize_to(stored: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="w4a16 or w4a8"):
        LoadPlan(stored("nvfp4"), "910")


def test_tensor_parallel_that_cuts_through_groups_is_refused(stored: Callable[..., Path]) -> None:
    plan, layout = LoadPlan(stored("w4a16", group_size=64), "cpu"), RolloutConfig(tensor_parallel=2, data_parallel=1)
    check_groups(plan, layout)
    with pytest.raises(ConfigError, match=r"rollout.expert_parallel to true"):
        check_groups(plan, dataclasses.replace(layout, expert_parallel=False))
    with pytest.raises(ConfigError, match="a divisor of 2"):
        check_groups(plan, dataclasses.replace(layout, tensor_parallel=4))
    # What is dequantized has no groups left to cut.
    check_groups(LoadPlan(stored("mxfp4"), "cpu"), dataclasses.replace(layout, tensor_parallel=4))


def test_scales_that_tensor_parallel_ranks_of_ascend_would_not_get_are_refused(stored: Callable[..., Path]) -> None:
    split = RolloutConfig(tensor_parallel=2, data_parallel=1, expert_parallel=False)
    options = {"layout": "msmodelslim", "attention": "w8a8"}
    groups, rows = (stored("w4a8", group_size=size, **options) for size in (32, -1))
    with pytest.raises(ConfigError, match=r"rollout.expert_parallel to true, or quantize with --group-size -1"):
        check_scales_of_rows(LoadPlan(groups, "910"), split)
    check_scales_of_rows(LoadPlan(groups, "910"), dataclasses.replace(split, expert_parallel=True))
    check_scales_of_rows(LoadPlan(groups, "910"), dataclasses.replace(split, tensor_parallel=1))
    check_scales_of_rows(LoadPlan(rows, "910"), split)
    check_scales_of_rows(LoadPlan(groups, "cpu"), split)
