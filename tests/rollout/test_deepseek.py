"""DeepSeek in the engine: adapters against HF, recorded experts against HF's routers, weights that are replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.rollout.limits import check_latent_width
from tests.ranks import run_engines
from tests.rollout.scenes import Plain, generate, hf_model, make_engine, request
from tests.rollout.shards import fill
from tests.rollout.test_families import GROUPS, _check, _scene

SIZES: dict[str, Any] = {"layers": 2, "key_value_rank": 512, "rope_head_dim": 64, "value_head_dim": 32}
"""Latents as wide as in all published models, which the CPU's kernel demands; one layer of two is dense."""
NO_ADAPTERS = LoraConfig(rank=0)


def _live(folders: list[Path]) -> dict[str, Any]:
    """An engine on the first checkpoint that gets the weights of the second, beside one that was built on that."""
    engines = [make_engine(folder, NO_ADAPTERS, record_routing=number == 1) for number, folder in enumerate(folders)]
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


@pytest.fixture(scope="module")
def live(tiny_checkpoint: Callable[..., Path], tiny_w8a8: Callable[..., Path]) -> tuple[dict[str, Any], Path]:
    sizes = SIZES | {"top_k": 3}
    folders = [tiny_checkpoint("deepseek_v3", "bfloat16", seed=seed, **sizes) for seed in (0, 1)]
    return run_engines(_live, 1, folders)[0], folders[1]


def test_a_live_engine_with_other_weights_is_an_engine_built_on_them(live: tuple[dict[str, Any], Path]) -> None:
    seen, _ = live
    assert seen["before"] != seen["expected"]
    assert seen["found"] == seen["expected"]


def test_recorded_experts_are_those_of_the_routers_and_dense_layers_have_none(
    live: tuple[dict[str, Any], Path],
) -> None:
    seen, folder = live
    chosen: list[torch.Tensor] = []
    model = hf_model(folder)
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
    with torch.no_grad():
        model(torch.from_numpy(seen["tokens"][:-1].astype(np.int64))[None])
    experts = seen["experts"]
    assert (experts[:, 0] == np.arange(3)).all()
    same = (np.sort(experts[:, 1], axis=-1) == np.sort(chosen[0].numpy(), axis=-1)).all(axis=-1)
    # bfloat16 decides near-ties otherwise; a wrong rule would agree in one of the 36 choices that two groups leave.
    assert same.mean() > 0.8


def _tensor_parallel(folder: Path) -> tuple[Plain, Plain, Plain]:
    return _scene(folder, {"tensor_parallel": 2}, [GROUPS, GROUPS])


def _one_rank(folder: Path) -> tuple[Plain, Plain, Plain]:
    assert os.environ["WORLD_SIZE"] == "1"
    return _scene(folder, {}, [GROUPS])


@pytest.mark.parametrize(
    ("family", "options", "ranks"),
    [("deepseek_v3", {"yarn": True}, 1), ("deepseek_v2", {"top_k": 3, "query_rank": 0}, 1), ("deepseek_v3", {}, 2)],
)
def test_adapters_equal_the_merged_model(
    tiny_w8a8: Callable[..., Path], family: str, options: dict[str, Any], ranks: int
) -> None:
    folder = tiny_w8a8(family, "bfloat16", **SIZES, **options)
    _check(folder, *run_engines(_one_rank if ranks == 1 else _tensor_parallel, ranks, folder)[0])


def test_latents_of_another_width_are_refused_before_an_engine_is_built(tiny_checkpoint: Callable[..., Path]) -> None:
    check_latent_width(tiny_checkpoint("deepseek_v3", "bfloat16", **SIZES))
    check_latent_width(tiny_checkpoint("qwen3_moe"))
    with pytest.raises(ConfigError, match="32 \\+ 16"):
        check_latent_width(tiny_checkpoint("deepseek_v3", layers=2))
