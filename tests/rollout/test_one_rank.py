"""One engine in one process: sampling, adapters against HF, noise, the KV cache, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.noise import Noise
from tests.ranks import run_engines
from tests.rollout.scenes import (
    LORA,
    MAX_LENGTH,
    generate,
    hf_log_probs,
    hf_model,
    log_prob_gaps,
    log_probs_of,
    make_engine,
    plain,
    random_adapters,
    request,
    tokens_of,
)
from tests.shared_memory import held

GROUPS = [0, 1, 2, 3, 4]
"""Prompts of 8 to 248 tokens; one KV block holds 128."""


def _scene(folder: Path) -> dict[str, Any]:
    engine = make_engine(folder)
    seen: dict[str, Any] = {"held": engine.held_bytes()}
    seen["clean"] = generate(engine, GROUPS, samples=3)
    seen["clean again"] = generate(engine, GROUPS, samples=3)
    seen["alone"] = generate(engine, [2], samples=3)
    seen["reversed"] = generate(engine, GROUPS[::-1], samples=3)
    seen["greedy"] = generate(engine, GROUPS, greedy=True)
    seen["cold"] = generate(engine, GROUPS, temperature=0.5)
    seen["full"] = plain(list(engine.generate([request(7, length=MAX_LENGTH - 3)])))
    _adapters(engine, folder, seen)
    _noise(engine, folder, seen)
    _kv_cache(engine, seen)
    _refusals(engine, folder, seen)
    return seen


def _adapters(engine: Any, folder: Path, seen: dict[str, Any]) -> None:
    adapters = random_adapters(folder, seed=1)
    seen["bytes"] = engine.set_adapters(adapters)
    seen["adapted"] = generate(engine, GROUPS, samples=3)
    engine.release_kv_cache()
    engine.restore_kv_cache()
    seen["adapted, empty cache"] = generate(engine, GROUPS, samples=3)
    engine.set_adapters(random_adapters(folder, seed=2))
    engine.set_adapters({name: 0 * tensor for name, tensor in adapters.items()})
    seen["adapters gone"] = generate(engine, GROUPS, samples=3)


def _noise(engine: Any, folder: Path, seen: dict[str, Any]) -> None:
    for name, (sigma, step) in {
        "noise": (0.05, 1),
        "noise, step 2": (0.05, 2),
        "noise, step 1 again": (0.05, 1),
        "little noise": (1e-4, 1),
        "noise gone": (0.0, 3),
    }.items():
        engine.set_noise(Noise(sigma, seed=3, step=step))
        seen[name] = generate(engine, GROUPS, samples=3)
    seen["router gaps"] = {exempt: _router_gap(engine, folder, exempt) for exempt in (False, True)}


def _router_gap(engine: Any, folder: Path, exempt: bool) -> float:
    """How far the first layer's router's logits are from those of its norm without noise, over the largest of them."""
    model = engine._engine.model_executor.driver_worker.worker.model_runner.model
    layer, pairs = model.model.layers[0], []
    norm, clean = layer.post_attention_layernorm, layer.post_attention_layernorm.weight.data
    with CheckpointReader(folder) as reader:
        router = reader.get("model.layers.0.mlp.gate.weight").float()
    engine.set_noise(Noise(0.05, seed=3, step=1, exempt_router=exempt))
    noisy = norm.weight.data
    hooks = [
        norm.register_forward_hook(
            lambda module, inputs, output: pairs.append(output[0].float() / noisy * clean @ router.t())
        ),
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: pairs.append(output[0].float())),
    ]
    generate(engine, GROUPS)
    for hook in hooks:
        hook.remove()
    engine.set_noise(Noise())
    expected, found = torch.cat(pairs[0::2]), torch.cat(pairs[1::2])
    return float((found - expected).abs().max() / expected.abs().max())


def _kv_cache(engine: Any, seen: dict[str, Any]) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    seen["released"], seen["released twice"] = engine.release_kv_cache(), engine.release_kv_cache()
    seen["rss drop"] = before - process.memory_info().rss
    seen["held released"] = engine.held_bytes()
    seen["error released"] = _error(lambda: generate(engine, [0]))
    engine.restore_kv_cache()
    seen["held restored"] = engine.held_bytes()
    seen["restored"] = generate(engine, GROUPS, samples=3)


def _refusals(engine: Any, folder: Path, seen: dict[str, Any]) -> None:
    # The first has room for 3 tokens only and comes first.
    stream = engine.generate([request(7, length=MAX_LENGTH - 3), *map(request, GROUPS)])
    next(stream)
    seen["error busy"] = _error(engine.release_kv_cache)
    stream.close()
    seen["after closing early"] = generate(engine, GROUPS, samples=3)
    seen["error twice"] = _error(lambda: generate(engine, [1, 1]))
    seen["error long"] = _error(lambda: list(engine.generate([request(9, length=MAX_LENGTH)])))
    adapters = random_adapters(folder, seed=1)
    adapters["model.layers.0.self_attn.k_proj.lora_A"] = adapters.pop("model.layers.0.self_attn.o_proj.lora_A")
    seen["error names"] = _error(lambda: engine.set_adapters(adapters))
    seen["error rank"] = _error(lambda: engine.set_adapters(random_adapters(folder, seed=1, rank=4)))
    seen["named memory"], _ = held()


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.fixture(scope="module")
def folder(tiny_w8a8: Callable[..., Path]) -> Path:
    return tiny_w8a8("qwen3_moe", "bfloat16")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return run_engines(_scene, 1, folder)[0]


def test_noise_can_be_kept_out_of_the_routers_input(seen: dict[str, Any]) -> None:
    # What is left is the rounding of bfloat16.
    assert seen["router gaps"][True] < 0.01 < seen["router gaps"][False]


def test_sampling_repeats_and_does_not_depend_on_the_batch(seen: dict[str, Any]) -> None:
    assert seen["clean again"] == seen["clean"]
    assert tokens_of(seen["alone"])[2] == tokens_of(seen["clean"])[2]
    assert tokens_of(seen["reversed"]) == tokens_of(seen["clean"])
    # Small batches take another bfloat16 kernel in the unquantized layers, hence not 0.
    assert log_prob_gaps(seen["alone"], seen["clean"]).max() < 0.1


def test_samples_of_a_group_differ_and_greedy_ones_do_not(seen: dict[str, Any]) -> None:
    for responses in tokens_of(seen["clean"]).values():
        assert len({tuple(response) for response in responses}) == 3
    for first, second in tokens_of(seen["greedy"]).values():
        assert first == second
    assert log_probs_of(seen["cold"]).mean() > log_probs_of(seen["clean"]).mean() + 0.5


def test_log_probs_are_of_the_logits_over_the_temperature(seen: dict[str, Any], folder: Path) -> None:
    model = hf_model(folder)
    model.lm_head.weight.data *= 2.0
    assert np.abs(hf_log_probs(model, seen["cold"]) - log_probs_of(seen["cold"])).mean() < 0.1


def test_a_response_ends_at_the_end_token_or_at_a_limit(seen: dict[str, Any]) -> None:
    reasons = set()
    for responses, rows, finish_reasons in seen["clean"].values():
        for response, row, reason in zip(responses, rows, finish_reasons, strict=True):
            reasons.add(reason)
            assert len(row) == len(response) <= 24
            assert (response[-1] == 2) == (reason == "stop")
            assert 2 not in response[:-1]
            assert reason == "stop" or len(response) == 24
    assert reasons == {"stop", "length"}
    responses, _, finish_reasons = seen["full"][7]
    assert all(len(response) <= 3 for response in responses)
    assert "length" in finish_reasons


def test_adapters_equal_the_merged_model_as_closely_as_the_base_does(seen: dict[str, Any], folder: Path) -> None:
    base, merged = hf_model(folder), hf_model(folder, random_adapters(folder, seed=1))
    base_error = np.abs(hf_log_probs(base, seen["clean"]) - log_probs_of(seen["clean"])).mean()
    error = np.abs(hf_log_probs(merged, seen["adapted"]) - log_probs_of(seen["adapted"])).mean()
    effect = np.abs(hf_log_probs(base, seen["adapted"]) - log_probs_of(seen["adapted"])).mean()
    assert base_error < 0.1
    assert error < 1.5 * base_error
    assert effect > 10 * error


def test_an_adapter_update_forgets_cached_prefixes(seen: dict[str, Any]) -> None:
    assert log_prob_gaps(seen["adapted"], seen["clean"]).max() > 0.5
    assert seen["adapted"] == seen["adapted, empty cache"]
    assert seen["adapters gone"] == seen["clean"]


def test_noise_changes_log_probs_by_seed_and_step_and_goes_without_a_trace(seen: dict[str, Any]) -> None:
    for name in ("noise", "noise, step 2", "little noise"):
        assert log_prob_gaps(seen[name], seen["clean"]).mean() > 1e-4
    assert log_prob_gaps(seen["noise"], seen["noise, step 2"]).mean() > 1e-2
    assert seen["noise, step 1 again"] == seen["noise"]
    assert seen["noise gone"] == seen["clean"]


def test_the_kv_cache_leaves_memory_and_comes_back(seen: dict[str, Any]) -> None:
    assert seen["released"] == seen["held"]["kv_cache"] == 32 << 20
    assert seen["released twice"] == 0
    assert seen["rss drop"] > 4 << 20
    assert seen["held released"] == seen["held"] | {"kv_cache": 0}
    assert "restore_kv_cache" in seen["error released"]
    assert seen["held restored"] == seen["held"]
    assert seen["restored"] == seen["clean"]


def test_held_bytes_count_int8_weights_and_float32_adapters(seen: dict[str, Any], folder: Path) -> None:
    expected = sum(tensor.nbytes for tensor in random_adapters(folder, seed=1).values())
    assert seen["held"]["adapters"] == seen["bytes"] == expected
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 0.8 * on_disk < seen["held"]["weights"] < 1.2 * on_disk


def test_wrong_use_says_what_is_wrong(seen: dict[str, Any]) -> None:
    assert "samples are being generated" in seen["error busy"]
    assert seen["after closing early"] == seen["clean"]
    assert "same group number" in seen["error twice"]
    assert f"max_length {MAX_LENGTH}" in seen["error long"]
    assert "o_proj.lora_A" in seen["error names"]
    assert "k_proj.lora_A" in seen["error names"]
    assert str(LORA.rank) in seen["error rank"]
    assert seen["named memory"] == []
