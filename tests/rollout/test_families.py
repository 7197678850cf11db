"""Every model family, with adapters in every layer, against HF: one rank, without AMX, and over two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import run_engines
from tests.rollout.scenes import (
    Plain,
    generate,
    hf_log_probs,
    hf_model,
    log_probs_of,
    make_engine,
    random_adapters,
)

GROUPS = [0, 1, 4]


def _scene(folder: Path, layout: dict[str, Any], shares: list[list[int]]) -> tuple[Plain, Plain]:
    engine = make_engine(folder, **layout)
    share = shares[int(os.environ["RANK"])]
    clean = generate(engine, share)
    engine.set_adapters(random_adapters(folder, seed=1))
    return clean, generate(engine, share)


def _scene_without_amx(folder: Path) -> tuple[Plain, Plain]:
    import torch

    # Both vLLM and oneDNN take the paths of a CPU that has AVX512-VNNI only.
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"
    torch.cpu._is_amx_tile_supported = lambda: False
    return _scene(folder, {}, [GROUPS])


def _check(folder: Path, clean: Plain, adapted: Plain) -> None:
    """Adapters must cost no more exactness than the int8 base has without them, and matter much more than that."""
    base, merged = hf_model(folder), hf_model(folder, random_adapters(folder, seed=1))
    base_error = np.abs(hf_log_probs(base, clean) - log_probs_of(clean)).mean()
    error = np.abs(hf_log_probs(merged, adapted) - log_probs_of(adapted)).mean()
    effect = np.abs(hf_log_probs(base, adapted) - log_probs_of(adapted)).mean()
    assert base_error < 0.15
    assert error < max(1.5 * base_error, 0.1)
    assert effect > 5 * error


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_family_with_adapters_equals_the_merged_model(tiny_w8a8: Callable[..., Path], family: str) -> None:
    folder = tiny_w8a8(family, "bfloat16", layers=2)
    clean, adapted = run_engines(_scene, 1, folder, {}, [GROUPS])[0]
    _check(folder, clean, adapted)


def test_shared_experts_and_biases_under_data_and_expert_parallel(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("qwen2_moe", "bfloat16", layers=2)
    ranks = run_engines(_scene, 2, folder, {"data_parallel": 2}, [GROUPS[:2], GROUPS[2:]])
    clean, adapted = ({**first, **second} for first, second in zip(*ranks, strict=True))
    _check(folder, clean, adapted)


def test_a_cpu_without_amx_runs_the_same_model(tiny_w8a8: Callable[..., Path]) -> None:
    folder = tiny_w8a8("qwen3_moe", "bfloat16")
    clean, adapted = run_engines(_scene_without_amx, 1, folder)[0]
    _check(folder, clean, adapted)
