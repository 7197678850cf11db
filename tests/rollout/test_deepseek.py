"""DeepSeek in the engine: adapters against HF, recorded experts against HF's routers, weights that are replaced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.rollout.limits import check_latent_width
from tests.ranks import run_engines
from tests.rollout import test_families
from tests.rollout.scenes import generate, hf_model, make_engine, request
from tests.rollout.shards import fill
from tests.rollout.test_families import GROUPS

SIZES: dict[str, Any] = {"layers": 2, "key_value_rank": 512, "rope_head_dim": 64, "value_head_dim": 32}
"""Latents as wide as in all published models, which the CPU's kernel demands; one layer of two is dense."""
NO_ADAPTERS = LoraConfig(rank=0)


def _live(folders: list[Path], make: Callable[..., Any]) -> dict[str, Any]:
    """An engine on the first checkpoint that gets the weights of the second, beside one that was built on that."""
    engines = [make(folder, NO_ADAPTERS, record_routing=number == 1) for number, folder in enumerate(folders)]
    before, expected = (generate(engine, GROUPS, greedy=True) for engine in engines)
    fill(engines[0], folders[1])
    [output] = engines[1].generate([request(1, samples=1)], greedy=True)
    return {
        "before": before,
        "expected": expected,
        "found": generate(engines[0], GROUPS, greedy=True),
        "tokens": np.concatenate([request(1).prompt_tokens, output.responses[0]]),
        "experts": output.routed_experts[0],
    }


Scenes = tuple[dict[str, Any], dict[str, test_families.Answers]]


def _one_rank(floats: list[Path], folders: dict[str, Path]) -> Scenes:
    """All in one process, which vLLM takes long to come up in. Engines stay: one that goes takes the others' groups."""
    kept = []

    def make(*arguments: Any, **options: Any) -> Any:
        kept.append(make_engine(*arguments, **options))
        return kept[-1]

    with mock.patch.object(test_families, "make_engine", make):
        adapted = {name: test_families._scene(folder, {}, [GROUPS]) for name, folder in folders.items()}
    return _live(floats, make), adapted


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V3, YaRN": ("deepseek_v3", {"yarn": True}),
    "DeepSeek-V2, queries in one projection": ("deepseek_v2", {"top_k": 3, "query_rank": 0}),
}


@pytest.fixture(scope="module")
def scenes(tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path]) -> Scenes:
    folders = {name: tiny_w8a8(family, "bfloat16", **SIZES, **options) for name, (family, options) in CASES.items()}
    return run_engines(_one_rank, 1, _floats(tiny_checkpoint), folders)[0]


def _floats(tiny_checkpoint: Callable[..., Path]) -> list[Path]:
    return [tiny_checkpoint("deepseek_v3", "bfloat16", seed=seed, top_k=3, **SIZES) for seed in (0, 1)]


def test_a_live_engine_with_other_weights_is_an_engine_built_on_them(scenes: Scenes) -> None:
    seen, _ = scenes
    assert seen["before"] != seen["expected"]
    assert seen["found"] == seen["expected"]


def test_recorded_experts_are_those_of_the_routers_and_dense_layers_have_none(
    scenes: Scenes, tiny_checkpoint: Callable[..., Path]
) -> None:
    seen, _ = scenes
    chosen: list[torch.Tensor] = []
    model = hf_model(_floats(tiny_checkpoint)[1])
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
    with torch.no_grad():
        model(torch.from_numpy(seen["tokens"][:-1].astype(np.int64))[None])
    experts = seen["experts"]
    assert (experts[:, 0] == np.arange(3)).all()
    same = (np.sort(experts[:, 1], axis=-1) == np.sort(chosen[0].numpy(), axis=-1)).all(axis=-1)
    # bfloat16 decides near-ties otherwise; a wrong rule would agree in one of the 36 choices that two groups leave.
    assert same.mean() > 0.8


@pytest.mark.parametrize("case", CASES)
def test_adapters_equal_the_merged_model(scenes: Scenes, tiny_w8a8: Callable[..., Path], case: str) -> None:
    family, options = CASES[case]
    test_families._check(tiny_w8a8(family, "bfloat16", **SIZES, **options), *scenes[1][case])


def _tensor_parallel(folder: Path) -> test_families.Answers:
    return test_families._scene(folder, {"tensor_parallel": 2}, [GROUPS, GROUPS])


def test_adapters_under_tensor_and_expert_parallel_equal_the_merged_model(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("deepseek_v3", "bfloat16", **SIZES)
    test_families._check(folder, *run_engines(_tensor_parallel, 2, folder)[0])


def test_a_cpu_without_amx_runs_the_same_model(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("deepseek_v3", "bfloat16", **SIZES)
    test_families._check(folder, *run_engines(test_families._scene_without_amx, 1, folder)[0])


def test_latents_of_another_width_are_refused_before_an_engine_is_built(tiny_checkpoint: Callable[..., Path]) -> None:
    check_latent_width(tiny_checkpoint("deepseek_v3", "bfloat16", **SIZES))
    check_latent_width(tiny_checkpoint("qwen3_moe"))
    with pytest.raises(ConfigError, match="32 \\+ 16"):
        check_latent_width(tiny_checkpoint("deepseek_v3", layers=2))
