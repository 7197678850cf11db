"""Adapters merged into the engine's weights, and the formats that it loads, against engines on plain checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.ranks import run_engines
from tests.rollout.scenes import (
    LORA,
    Plain,
    generate,
    hf_log_probs,
    hf_model,
    log_prob_gaps,
    log_probs_of,
    make_engine,
    model_of,
    random_adapters,
    write_merged,
)

GROUPS = [0, 1, 4]
"""Prompts of 8, 68 and 248 tokens: one KV block holds 128."""
NATIVE = ("w8a8", "w4a16")
SLIM = "w4a8 as msmodelslim describes it"
FORMATS = (*NATIVE, "w4a8", SLIM, "nvfp4", "mixed")
"""One of those that are dequantized stands for all: the loader asks the format itself (mixed has mxfp4)."""
FUSED = "model.layers.1.self_attn.qkv_proj"
NEAREST = dataclasses.replace(LORA, in_rollout="merge", merge_rounding="nearest")
STOCHASTIC = dataclasses.replace(LORA, in_rollout="merge")
OFF = LoraConfig(attention=False, experts=False, shared_experts=False)


def _scene(folders: dict[str, Path], out: Path) -> dict[str, Any]:
    """Of each format, what an engine says that merges, and what engines on checkpoints say that others wrote."""
    seen, engines = {}, []

    def engine(folder: Path, lora: LoraConfig) -> Any:
        # vLLM forgets its process groups when an engine goes, also those of the next one.
        engines.append(make_engine(folder, lora))
        return engines[-1]

    for name, folder in folders.items():
        as_floats = name not in NATIVE
        adapters = random_adapters(folder, seed=1, deviation=0.05)
        merging = engine(folder, NEAREST)
        seen[name, "line"] = merging.description
        seen[name, "kernels"] = {
            type(module.quant_method.moe_kernel.fused_experts).__name__
            for path, module in model_of(merging).named_modules()
            if path.endswith("routed_experts")
        }
        seen[name, "clean"] = generate(merging, GROUPS)
        merging.set_adapters(adapters, 1)
        seen[name, "merged"] = generate(merging, GROUPS)
        merging.set_adapters({key: 0 * tensor for key, tensor in adapters.items()}, 2)
        if name == "w8a8":
            broken = adapters | {f"{FUSED}.lora_B": adapters[f"{FUSED}.lora_B"][:-32]}
            seen["error shape"] = _error(partial(merging.set_adapters, broken, 3))
            seen["error names"] = _error(partial(merging.set_adapters, {}, 3))
        seen[name, "merged away"] = generate(merging, GROUPS)
        if name in ("nvfp4", "mixed"):
            twin = write_merged(folder, {}, out / f"{name}-twin", as_floats=True)
            seen[name, "twin"] = generate(engine(twin, OFF), GROUPS)
        if name in (*NATIVE, "nvfp4"):
            merged = write_merged(folder, adapters, out / f"{name}-merged", as_floats=as_floats)
            seen[name, "fresh"] = generate(engine(merged, OFF), GROUPS)
    for name in NATIVE:
        seen[name, "survival"] = _survival(engine(folders[name], STOCHASTIC), folders[name])
    seen["error"] = _error(partial(engine, folders["w4a16"], dataclasses.replace(LORA, in_rollout="adapter")))
    return seen


def _survival(engine: Any, folder: Path) -> dict[str, float]:
    """Of adapters a hundredth as large as a step, over 8 steps; and with nearest rounding."""
    applied = wanted = 0.0
    adapters = random_adapters(folder, seed=2, deviation=0.003 if "w8a8" in folder.name else 0.01)
    for step in range(8):
        engine.set_adapters(adapters, step)
        applied, wanted = applied + engine.survival.applied, wanted + engine.survival.wanted
    engine._adapters._lora = NEAREST
    engine.set_adapters(adapters, 8)
    return {"stochastic": applied / wanted, "nearest": engine.survival.ratio}


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ConfigError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2)
    built = {}
    for name in FORMATS:
        built[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        if name == "mixed":
            quantize_checkpoint(source, built[name], "mxfp4", attention="w8a8", keep_layers=[1])
        elif name == SLIM:
            quantize_checkpoint(source, built[name], "w4a8", layout="msmodelslim", group_size=32)
        else:
            quantize_checkpoint(source, built[name], name, group_size=32 if name.startswith("w4") else 0)
    return built


@pytest.fixture(scope="module")
def seen(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_engines(_scene, 1, folders, tmp_path_factory.mktemp("merged"))[0]


@pytest.mark.parametrize("name", NATIVE)
def test_merged_weights_are_those_of_a_checkpoint_with_the_merged_model(seen: dict[str, Any], name: str) -> None:
    assert seen[name, "merged"] == seen[name, "fresh"]
    assert log_prob_gaps(seen[name, "merged"], seen[name, "clean"]).mean() > 0.1


def test_a_format_without_a_kernel_is_its_bfloat16_twin(seen: dict[str, Any]) -> None:
    assert seen["nvfp4", "kernels"] <= {"CPUUnquantizedExperts", "X86CPUUnquantizedExperts"}
    assert seen["nvfp4", "clean"] == seen["nvfp4", "twin"]
    assert seen["nvfp4", "merged"] == seen["nvfp4", "fresh"]
    assert "dequantized to bfloat16" in seen["nvfp4", "line"]


def test_what_msmodelslim_describes_runs_and_is_merged_into_as_its_twin(seen: dict[str, Any]) -> None:
    for kind in ("line", "kernels", "clean", "merged"):
        assert seen[SLIM, kind] == seen["w4a8", kind], kind


@pytest.mark.parametrize("name", FORMATS)
def test_a_merge_of_nothing_gives_the_base_back(seen: dict[str, Any], name: str) -> None:
    assert seen[name, "merged away"] == seen[name, "clean"]


def _error_of(folder: Path, outputs: Plain) -> float:
    return float(np.abs(hf_log_probs(hf_model(folder), outputs) - log_probs_of(outputs)).mean())


@pytest.mark.parametrize("name", ["w4a16", "w4a8"])
def test_int4_runs_in_its_own_kernel_as_exactly_as_int8(
    seen: dict[str, Any], folders: dict[str, Path], name: str
) -> None:
    """Both round activations to 8 bits a token; the weights are exact on either grid."""
    assert seen[name, "kernels"] == {"CPUExpertsInt4"}
    assert "native" in seen[name, "line"]
    assert seen["w8a8", "kernels"] == {"CPUExpertsInt8"}
    # The scale of a row of activations is that of its largest, so 8 bits leave it half a percent off, layer by layer.
    assert _error_of(folders[name], seen[name, "clean"]) < 2 * _error_of(folders["w8a8"], seen["w8a8", "clean"]) < 0.2


def test_a_mixed_checkpoint_runs_each_layer_as_it_is_stored(seen: dict[str, Any], folders: dict[str, Path]) -> None:
    assert "mxfp4" in seen["mixed", "line"]
    assert "w8a8" in seen["mixed", "line"]
    # Its int8 attention rounds activations; the rest is the twin's.
    assert log_prob_gaps(seen["mixed", "clean"], seen["mixed", "twin"]).mean() < 0.1
    assert _error_of(folders["mixed"], seen["mixed", "clean"]) < 0.1


@pytest.mark.parametrize("name", NATIVE)
def test_small_updates_survive_in_the_engines_weights(seen: dict[str, Any], name: str) -> None:
    survival = seen[name, "survival"]
    assert abs(survival["stochastic"] - 1.0) < 0.1
    assert abs(survival["nearest"]) < 0.1


def test_adapters_that_fit_no_weight_are_refused_and_change_nothing(seen: dict[str, Any]) -> None:
    assert FUSED in seen["error shape"]
    assert f"needs 256 rows of {LORA.rank}" in seen["error shape"]
    assert "missing" in seen["error names"]
    assert seen["w8a8", "merged away"] == seen["w8a8", "clean"]


def test_adapters_where_no_kernel_takes_them_are_refused_with_the_fix(seen: dict[str, Any]) -> None:
    assert "CPUExpertsInt4" in seen["error"]
    assert "lora.in_rollout to auto or merge" in seen["error"]
