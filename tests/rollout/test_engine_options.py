"""Options of the engine that a CPU has as well: they change how it computes, and not what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qerl_rl.config.ascend_schema import AscendConfig
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RolloutConfig
from qerl_rl.rollout.ascend_options import additional_config
from qerl_rl.rollout.engine_options import engine_arguments
from qerl_rl.rollout.limits import check_kv_cache
from qerl_rl.rollout.load_plan import LoadPlan
from tests.ranks import run_engines
from tests.rollout.scenes import log_prob_gaps, make_engine, plain, request, tokens_of

GROUPS = [0, 2, 4]
"""Prompts of 8, 128 and 248 tokens."""
WHOLE = {"max_sequences": 8}
PARTS = WHOLE | {"chunked_prefill": True, "max_batched_tokens": 48, "kv_block_tokens": 32}
SMALL = WHOLE | {"kv_cache_dtype": "fp8"}
ON_NPU = RolloutConfig(enforce_eager=False, ascend=AscendConfig(graph_mode="piecewise", max_capture_size=64))
GIVEN = ("additional_config", "enable_sleep_mode", "max_cudagraph_capture_size", "compilation_config", "load_format")
SCENES = {"whole": WHOLE, "parts": PARTS, "small": SMALL}


def _scene(folder: Path) -> dict[str, Any]:
    # An engine that ends takes the process groups of the others with it: all stay.
    engines = {name: make_engine(folder, record_routing=True, **options) for name, options in SCENES.items()}
    seen = {name: _seen(engine) for name, engine in engines.items()}
    seen["parts"]["again"] = plain(list(engines["parts"].generate([request(group, 3) for group in GROUPS])))
    for platform in ("cpu", "910"):
        arguments = engine_arguments(LoadPlan(folder, platform), ON_NPU, 400, 0)
        seen[platform] = {name: repr(getattr(arguments, name)) for name in GIVEN}
    return seen


def _seen(engine: Any) -> dict[str, Any]:
    runner = engine._engine.model_executor.driver_worker.worker.model_runner
    steps, original = [], runner.execute_model

    def execute_model(scheduled: Any, *rest: Any) -> Any:
        steps.append(scheduled.total_num_scheduled_tokens)
        return original(scheduled, *rest)

    runner.execute_model = execute_model
    outputs = list(engine.generate([request(group, 3) for group in GROUPS]))
    [scores] = engine.score([np.arange(4, 204, dtype=np.int32) % 60])
    return {
        "outputs": plain(outputs),
        "experts": {output.group: [rows.tolist() for rows in output.routed_experts] for output in outputs},
        "scores": scores.tolist(),
        "most tokens": max(steps),
        "blocks": runner.kv_cache_config.num_blocks,
        "block tokens": runner.cache_config.block_size,
    }


@pytest.fixture(scope="module")
def seen(tiny_w8a8: Callable[..., Path]) -> dict[str, Any]:
    return run_engines(_scene, 1, tiny_w8a8("qwen3_moe", "bfloat16"))[0]


def test_prompts_in_parts_give_what_whole_ones_give(seen: dict[str, Any]) -> None:
    parts, whole = seen["parts"], seen["whole"]
    assert parts["most tokens"] <= PARTS["max_batched_tokens"] < whole["most tokens"]
    assert tokens_of(parts["outputs"]) == tokens_of(whole["outputs"])
    # Small batches may take another bfloat16 kernel in the unquantized layers, hence not 0.
    assert log_prob_gaps(parts["outputs"], whole["outputs"]).max() < 0.1
    assert np.abs(np.subtract(parts["scores"], whole["scores"])).max() < 0.1
    assert parts["again"] == parts["outputs"]


def test_experts_are_recorded_of_prompts_in_parts(seen: dict[str, Any]) -> None:
    for group in GROUPS:
        for found, expected in zip(seen["parts"]["experts"][group], seen["whole"]["experts"][group], strict=True):
            # A near tie may fall the other way.
            assert np.mean(np.sort(found) == np.sort(expected)) > 0.95


def test_blocks_of_the_kv_cache_have_the_size_asked_for(seen: dict[str, Any]) -> None:
    assert (seen["whole"]["block tokens"], seen["parts"]["block tokens"]) == (128, 32)
    assert seen["parts"]["blocks"] == 4 * seen["whole"]["blocks"]


def test_a_cache_in_fp8_holds_twice_as_much_and_gives_nearly_the_same(seen: dict[str, Any]) -> None:
    assert seen["small"]["blocks"] == 2 * seen["whole"]["blocks"]
    gaps = np.abs(np.subtract(seen["small"]["scores"], seen["whole"]["scores"]))
    assert 0 < gaps.mean() < 0.1 * np.std(seen["whole"]["scores"])


def test_an_engine_on_npus_gets_its_own_options_and_loads_by_itself(seen: dict[str, Any]) -> None:
    on_npu, on_cpu = seen["910"], seen["cpu"]
    assert repr(additional_config(ON_NPU.ascend)) == on_npu["additional_config"] != on_cpu["additional_config"]
    assert (on_npu["enable_sleep_mode"], on_cpu["enable_sleep_mode"]) == ("True", "False")
    assert (on_npu["max_cudagraph_capture_size"], on_cpu["max_cudagraph_capture_size"]) == ("64", "None")
    assert "PIECEWISE" in on_npu["compilation_config"]
    assert (on_npu["load_format"], on_cpu["load_format"]) == ("'auto'", "'qerl_rl'")


@pytest.mark.parametrize(
    ("options", "on_npu", "fix"),
    [
        ({"kv_cache_dtype": "int8"}, False, "auto or fp8"),
        ({"kv_cache_dtype": "fp8"}, True, "auto or int8"),
        ({"kv_block_tokens": 48}, False, "to 64"),
    ],
)
def test_a_cache_that_no_kernel_reads_is_refused(options: dict[str, Any], on_npu: bool, fix: str) -> None:
    check_kv_cache(RolloutConfig(), on_npu=on_npu)
    with pytest.raises(ConfigError) as caught:
        check_kv_cache(RolloutConfig(**options), on_npu=on_npu)
    assert fix in caught.value.fix
