"""Weights and KV cache of a vllm-ascend engine leave memory and come back, under its own worker and allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Weights
from qerl_rl.platform import ops
from qerl_rl.rollout.ascend.sleep import KV_CACHE, WEIGHTS, AscendKvCache, AscendWeights, SleepMode
from qerl_rl.rollout.full_tensors import put
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.vllm_engine import VllmEngine
from tests.rollout.ascend import models, wheel
from tests.rollout.ascend.card import Card, worker_on
from tests.rollout.ascend.layers import bits
from tests.rollout.shards import full_weights

MODULES = (*wheel.MODULES, "vllm_ascend.worker.worker", "vllm_ascend.device_allocator.camem")
LAYOUT = (1, 1, False)


class _Scene:
    """An engine on a model of vllm-ascend's layers, whose tensors lie on a card, and another policy to write."""

    def __init__(self, load: Callable[[str], Any], first: Path, second: Path, noted: dict[int, Any]) -> None:
        plan, architecture = LoadPlan(first, "910"), MoeArchitecture.from_folder(first)
        self.layout = EngineLayout(architecture, *LAYOUT, full_weights(first)[0])
        self.second = second
        plain = EngineLayout(architecture, *LAYOUT, Weights())
        model, fresh = (models.build(load, plan, plain, 0) for _ in range(2))
        noted |= models.metadata(model)
        models.load_into(model, models.cut(self.layout, 0, first))
        models.load_into(fresh, models.cut(self.layout, 0, second))
        self.model, self.fresh = model, models.held(fresh)
        # As a rank of experts has one, beside its parameters.
        model.get_submodule("model.layers.0.mlp.experts")._expert_map = torch.arange(8)
        config = models.vllm_config()
        architecture_of = SimpleNamespace(hidden_size=model.get_parameter("model.norm.weight").numel())
        config.model_config.enable_sleep_mode, config.model_config.hf_text_config = True, architecture_of
        config.quant_config = None if plan.stored_format(_ANY) is None else "compressed-tensors"
        self.caches = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(2)]
        self.card = Card(load)
        self.card.allocate(WEIGHTS, models.held(model).values())
        self.card.allocate(KV_CACHE, [cache for pair in self.caches for cache in pair])
        self.workspace = torch.ones(8)
        self.card.allocate("default", [self.workspace])
        self.worker = worker_on(self.card, load, model, config)
        self.engine = self._engine(plan, config)

    def _engine(self, plan: LoadPlan, config: SimpleNamespace) -> VllmEngine:
        """An engine without vLLM: what it asks of it about requests is answered here."""
        engine = VllmEngine.__new__(VllmEngine)
        mode = SleepMode(self.worker)
        quiet: Any = mock.Mock(get_num_unfinished_requests=lambda: 0, vllm_config=config)
        quiet.model_executor.driver_worker.worker = self.worker
        engine._engine, engine._plan = quiet, plan
        engine._weight_memory, engine._kv_cache = AscendWeights(self.model, mode), AscendKvCache(self.caches, mode)
        engine._adapters = engine._weight_target = None
        engine._noise, engine._lending = mock.Mock(), mock.Mock(storages=lambda: set(), nbytes=0)
        return engine

    def write_second(self) -> None:
        target = self.engine.weight_target()
        put(target, self.layout, 0, full_weights(self.second)[1])
        target.finish()

    def check(self, expected: dict[str, torch.Tensor]) -> None:
        found = models.held(self.model)
        for path, tensor in expected.items():
            assert torch.equal(bits(found[path]), bits(tensor)), path
        assert torch.equal(self.workspace, torch.ones(8))


_ANY = "model.layers.0.self_attn.q_proj.weight"
STORE: Any = object()
"""Where weights stay on other platforms; vllm-ascend keeps them itself."""


@pytest.fixture
def scene(
    tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Any]:
    """`scene(format)` -> context of a `_Scene`."""
    monkeypatch.setattr(ops, "to_fractal_nz", wheel.fractal_nz)

    @contextmanager
    def made(format: str) -> Iterator[_Scene]:
        folders = [tiny_checkpoint("qwen3_moe", "bfloat16", seed=seed, layers=2) for seed in (0, 1)]
        if format != "none":
            folders = [tiny_quantized(folder, format) for folder in folders]
        noted: dict[int, Any] = {}
        given = wheel.given({}, wheel.AscendConfig()) | models.stubs(noted)
        with wheel.wheel(*MODULES, given=given) as load:
            yield _Scene(load, folders[0], folders[1], noted)

    return made


def _clones(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {path: tensor.clone() for path, tensor in models.held(model).items()}


@pytest.mark.parametrize("format", ["w8a8", "none"])
def test_weights_that_sleep_on_the_host_come_back_bit_for_bit(scene: Callable[[str], Any], format: str) -> None:
    with scene(format) as here:
        before, used = _clones(here.model), here.card.used
        caches = sum(cache.nbytes for pair in here.caches for cache in pair)
        assert here.engine.release_kv_cache() == caches
        assert here.card.used == used - caches
        assert here.engine.release_weights(STORE) > 0
        assert here.card.used == here.workspace.nbytes
        assert here.engine.held_bytes() == {"weights": 0, "shared": 0, "adapters": 0, "kv_cache": 0}
        here.engine.restore_weights()
        here.check(before)
        here.engine.restore_kv_cache()
        assert here.card.used == used
        assert all(not cache.any() for pair in here.caches for cache in pair)
        assert here.card.calls == [("sleep", 1), ("sleep", 1), ("wake_up", [WEIGHTS]), ("wake_up", [KV_CACHE])]
        here.write_second()
        here.check(here.fresh)


@pytest.mark.parametrize("format", ["w8a8", "none"])
def test_weights_that_were_given_up_are_written_between_the_two_awakenings(
    scene: Callable[[str], Any], format: str
) -> None:
    with scene(format) as here:
        experts = here.model.get_submodule("model.layers.0.mlp.experts")
        here.engine.release_kv_cache()
        here.engine.release_weights(None)
        assert not torch.equal(experts._expert_map, torch.arange(8))
        with pytest.raises(RuntimeError, match="given up: write all of them"):
            here.engine.restore_weights()
        with pytest.raises(RuntimeError, match="weights sleep: restore_weights"):
            here.engine.restore_kv_cache()
        here.write_second()
        here.engine.restore_kv_cache()
        here.check(here.fresh)
        assert torch.equal(experts._expert_map, torch.arange(8))
        assert here.card.calls == [("sleep", 1), ("sleep", 2), ("wake_up", [WEIGHTS]), ("wake_up", [KV_CACHE])]


def test_the_cache_sleeps_alone_and_weights_are_written_meanwhile(scene: Callable[[str], Any]) -> None:
    with scene("w8a8") as here:
        before = _clones(here.model)
        here.engine.release_kv_cache()
        assert here.engine.release_kv_cache() == 0
        here.check(before)
        here.write_second()
        here.engine.restore_kv_cache()
        here.engine.restore_kv_cache()
        here.check(here.fresh)
        assert here.card.calls == [("sleep", 1), ("wake_up", [KV_CACHE])]


def test_nothing_runs_on_what_sleeps(scene: Callable[[str], Any]) -> None:
    with scene("w8a8") as here:
        mode = SleepMode(here.worker)
        with pytest.raises(RuntimeError, match="kv_cache do not sleep"):
            mode.wake(KV_CACHE)
        here.engine.release_kv_cache()
        with pytest.raises(RuntimeError, match="KV cache is released"):
            next(here.engine.generate([]))
        here.engine.restore_kv_cache()
        here.engine.release_weights(None)
        with pytest.raises(RuntimeError, match="weights are released"):
            next(here.engine.generate([]))
        here.engine.weight_target()
        with pytest.raises(RuntimeError, match="weights are released"):
            next(here.engine.generate([]))
        here.worker.vllm_config.model_config.enable_sleep_mode = False
        with pytest.raises(RuntimeError, match="made without sleep mode"):
            here.engine.release_kv_cache()
