"""Weights that arrive in shards in a live engine, against engines that were built on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qerl_rl.config.schema import LoraConfig, RolloutConfig
from qerl_rl.quant.noise import Noise
from qerl_rl.rollout.repack import once_a_matrix
from qerl_rl.rollout.vllm_engine import VllmEngine
from tests.ranks import run_engines
from tests.rollout.scenes import MAX_LENGTH, Plain, generate, request
from tests.rollout.shards import fill

GROUPS = [0, 1, 4]
"""Prompts of 8, 68 and 248 tokens: one KV block holds 128."""
LAYOUTS = {
    "tensor parallel": {"tensor_parallel": 2, "expert_parallel": False},
    "data and expert parallel": {"data_parallel": 2},
}


class _Engines:
    """Engines side by side: vLLM forgets its process groups when one goes, also those of the others."""

    def __init__(self, **layout: Any) -> None:
        if layout:
            dist.init_process_group("gloo")
        self._options = {"data_parallel": 1, "max_response_tokens": 24, "kv_cache_bytes": 16 << 20} | layout
        self._kept: list[VllmEngine] = []

    def __call__(self, folder: Path, quantize_to: str | None = None) -> VllmEngine:
        rollout = RolloutConfig(**self._options)
        options = {"max_length": MAX_LENGTH, "seed": 0, "quantize_to": quantize_to}
        self._kept.append(VllmEngine(folder, rollout, LoraConfig(rank=0), **options))
        return self._kept[-1]


class _Store:
    """Bytes by slot, in memory."""

    def __init__(self) -> None:
        self.slots: dict[int, torch.Tensor] = {}

    def write(self, slot: int, data: torch.Tensor) -> None:
        assert self.slots.get(slot, data).shape == data.shape
        self.slots[slot] = data.clone()

    def read(self, slot: int, data: torch.Tensor) -> None:
        data.copy_(self.slots[slot])


def _answers(engine: VllmEngine) -> Plain:
    return generate(engine, GROUPS, greedy=True)


def _scored(engine: VllmEngine, temperature: float, groups: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of responses as they were generated, and as they are scored."""
    outputs = generate(engine, groups, samples=3, temperature=temperature)
    rows = [
        (request(group).prompt_tokens, response, log_probs)
        for group in groups
        for response, log_probs in zip(*outputs[group][:2], strict=True)
    ]
    tokens = [np.concatenate([prompt, np.asarray(response, np.int32)]) for prompt, response, _ in rows]
    scores = engine.score(tokens, temperature=temperature)
    assert all(len(score) == len(row) - 1 for score, row in zip(scores, tokens, strict=True))
    found = [score[len(prompt) - 1 :] for (prompt, _, _), score in zip(rows, scores, strict=True)]
    return np.concatenate([[], *(row for _, _, row in rows)]), np.concatenate([[], *found])


def _scene(cases: dict[str, tuple[Path, Path, Path | None]]) -> dict[str, dict[str, Any]]:
    engine_on = _Engines()
    return {name: _exchanged(engine_on, *case, name.split()[1]) for name, case in cases.items()}


def _exchanged(engine_on: _Engines, first: Path, second: Path, source: Path | None, format: str) -> dict[str, Any]:
    """An engine on `first` (where there is a `source`, on that checkpoint of its floats, rounded) gets `second`."""
    live, fresh = engine_on(source, format) if source else engine_on(first), engine_on(second)
    seen: dict[str, Any] = {"first": _answers(live), "second": _answers(fresh), "held": live.held_bytes()}
    seen["scored"] = [_scored(live, temperature, GROUPS) for temperature in (1.0, 0.5)]
    seen["first, scored"] = _answers(live)
    _release(live, seen)
    live.set_noise(Noise(0.05, seed=3, step=1))
    # An update that breaks off leaves nothing to the next one.
    broken, local = live.weight_target(), "model.layers.0.self_attn.qkv_proj.weight"
    some = next(name for name in broken.locals if name.startswith(local))
    broken.write(some).zero_()
    broken.complete(some)
    seen["error"] = _error(broken.finish)
    seen["given up"] = live.release_weights(None)
    seen["error given up"] = _error(live.restore_weights)
    seen["written"] = fill(live, second)
    seen["first to second"] = _answers(live)
    fill(fresh, first)
    seen["second to first"] = _answers(fresh)
    seen["held at last"] = live.held_bytes()
    return seen


def _release(engine: VllmEngine, seen: dict[str, Any]) -> None:
    store, other = _Store(), _Store()
    seen["released"] = engine.release_weights(store), engine.release_weights(other)
    seen["held released"] = engine.held_bytes()
    seen["error released"] = _error(partial(generate, engine, [0]))
    engine.restore_weights()
    seen["restored"] = _answers(engine)
    for data in store.slots.values():
        data.zero_()
    # What has not changed is not written again: what comes back are zeros.
    engine.release_weights(store)
    engine.restore_weights()
    seen["restored zeros"] = _answers(engine)


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


FLOATS, FUSED = "floats", "fused"
CASES = {
    "qwen3_moe none": None,
    "qwen3_moe w8a8": FLOATS,
    "qwen3_moe w4a16": None,
    "qwen3_moe nvfp4": FUSED,
    "qwen2_moe w8a8": None,
    "mixtral none": FUSED,
    "phimoe none": None,
}
"""Families and formats (biases, shared experts and tied embeddings are qwen2_moe's; layer norms phimoe's, and biases of
the attention's output and of the output layer).

FLOATS: one engine rounds the float checkpoint while it loads it; the other one gets what `quantize` wrote. FUSED: and
that checkpoint has fused experts.
"""


@pytest.fixture(scope="module")
def seen(
    tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path], tiny_fused: Callable[..., Path]
) -> dict[str, dict[str, Any]]:
    cases: dict[str, tuple[Path, Path, Path | None]] = {}
    for name, loaded in CASES.items():
        family, format = name.split()
        first, second = (tiny_checkpoint(family, "bfloat16", seed=seed, layers=2) for seed in (0, 1))
        source = {FLOATS: first, FUSED: tiny_fused(first) if loaded == FUSED else None}.get(loaded)
        options = {"group_size": 32} if format == "w4a16" else {}
        if format != "none":
            first, second = (tiny_quantized(folder, format, **options) for folder in (first, second))
        cases[name] = first, second, source
    return run_engines(_scene, 1, cases)[0]


@pytest.mark.parametrize("case", CASES)
def test_a_live_engine_with_other_weights_is_an_engine_built_on_them(
    seen: dict[str, dict[str, Any]], case: str
) -> None:
    found = seen[case]
    assert found["first"] != found["second"]
    assert found["first to second"] == found["second"]
    assert found["second to first"] == found["first"]


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_scored_as_they_were_generated(seen: dict[str, dict[str, Any]], case: str) -> None:
    for generated, scored in seen[case]["scored"]:
        assert len(generated) > 40
        _check_scores(generated, scored)
    tempered, halved = (scored for _, scored in seen[case]["scored"])
    assert abs(tempered.mean() - halved.mean()) > 0.1
    assert seen[case]["first, scored"] == seen[case]["first"]


@pytest.mark.parametrize("case", CASES)
def test_weights_leave_memory_and_come_back(seen: dict[str, dict[str, Any]], case: str) -> None:
    found = seen[case]
    assert found["restored"] == found["first"]
    assert found["restored zeros"] != found["first"]
    held, (released, twice) = found["held"]["weights"], found["released"]
    assert twice == 0
    assert found["held released"] == found["held"] | {"weights": held - released}
    assert found["given up"] == released > 0.5 * held
    assert found["held at last"] == found["held"]
    assert 0 < found["written"] < 1.5 * held
    assert "restore_weights" in found["error released"]
    assert "never completed" in found["error"]
    assert "weight_target" in found["error given up"]


def _check_scores(generated: np.ndarray, scored: np.ndarray) -> None:
    """Equal but where up to 4 sequences are left, whose unquantized layers take another kernel.

    Logits between 4 and 8 lie 2^-5 apart in bfloat16.
    """
    gaps = np.abs(generated - scored)
    assert np.median(gaps) == 0
    assert gaps.mean() < 2.0**-5


def _two_ranks(folders: list[tuple[Path, Path]], layout: dict[str, Any]) -> list[dict[str, Any]]:
    engine_on, seen = _Engines(**layout), []
    for first, second in folders:
        live, fresh = engine_on(first), engine_on(second)
        answers = {"first": _answers(live), "second": _answers(fresh)}
        fill(live, second)
        answers["first to second"] = _answers(live)
        fill(fresh, first)
        answers["second to first"] = _answers(fresh)
        # The last data-parallel rank has nothing to score.
        is_idle = "data_parallel" in layout and dist.get_rank() == 1
        seen.append(answers | {"scored": _scored(live, 1.0, [] if is_idle else GROUPS)})
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_takes_its_shards(
    tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path], layout: str
) -> None:
    sources = [tiny_checkpoint("qwen3_moe", "bfloat16", seed=seed, layers=2) for seed in (0, 1)]
    folders = [tuple(sources), tuple(tiny_quantized(source, "w8a8") for source in sources)]
    for rank in run_engines(_two_ranks, 2, folders, LAYOUTS[layout]):
        for seen in rank:
            assert seen["first"] != seen["second"]
            assert seen["first to second"] == seen["second"]
            assert seen["second to first"] == seen["first"]
            if len(seen["scored"][0]):
                _check_scores(*seen["scored"])


def test_a_number_for_each_row_becomes_one_a_matrix() -> None:
    scale = torch.arange(1.0, 4.0).view(3, 1, 1).expand(3, 8, 1)
    assert torch.equal(once_a_matrix(scale, torch.empty(3)), torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(once_a_matrix(scale, torch.empty(3, 2))[:, 1], torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(once_a_matrix(scale[1], torch.empty(3)), torch.full((3,), 2.0))
    assert once_a_matrix(scale, scale) is scale
