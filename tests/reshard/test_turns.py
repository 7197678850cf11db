"""Policy, critic and reward model take turns on the card: real engines, and a rollout engine that only remembers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qerl_rl.config.schema import Config, RewardModelConfig, SwapConfig
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Adapters
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.quant.noise import Noise
from qerl_rl.reshard.ledger import CRITIC, POLICY, REWARD_MODEL
from qerl_rl.train.engine import TrainEngine
from qerl_rl.train.value_engine import RewardModelEngine, ValueEngine
from tests.train.models import make_config, make_samples, policy_gradient, start_engine
from tests.train.test_value_engine import classifier, returning, value_loss

ROUNDS = ("rollout", POLICY, CRITIC, REWARD_MODEL, POLICY, "rollout", CRITIC, "rollout")


class RememberingRollout:
    """Stands in for the engine: what the swap asks of it, without a model."""

    survival = None

    def __init__(self, policy: TrainEngine) -> None:
        self.kv_cache, self.served = 64, 0
        layout = EngineLayout(policy.architecture, 1, 1, False, Adapters(policy.config.lora))
        self.adapters = {name: torch.zeros(shape) for name, shape in layout.local_shapes(0).items()}
        self.missing: set[str] = set()

    def adapter_target(self, step: int) -> RememberingRollout:
        self.missing = set(self.adapters)
        return self

    def write(self, local: str) -> torch.Tensor:
        return self.adapters[local]

    def complete(self, local: str) -> None:
        self.missing.remove(local)

    def finish(self) -> int:
        assert not self.missing
        self.served += 1
        return sum(tensor.nbytes for tensor in self.adapters.values())

    def set_noise(self, noise: Noise) -> None:
        assert noise.sigma == 0.0

    def restore_kv_cache(self) -> None:
        self.kv_cache = 64

    def release_kv_cache(self) -> int:
        freed, self.kv_cache = self.kv_cache, 0
        return freed

    def held_bytes(self) -> dict[str, int]:
        return {"kv_cache": self.kv_cache}


def take_turns(config: Config, folder: str, intrude: bool) -> dict[str, Any]:
    """The phases ROUNDS, in each of which its model works and, to `intrude`, the others try to; what came of it."""
    from qerl_rl.reshard.swap import Swap

    policy = start_engine(config, store=SpillFile(folder))
    rollout = RememberingRollout(policy)
    policy.offload()
    critic = ValueEngine(config, SpillFile(folder))
    critic.offload()
    judge = RewardModelEngine(config, SpillFile(folder))
    beside = {CRITIC: critic, REWARD_MODEL: judge}
    swap = Swap(policy, rollout, config, beside)  # type: ignore[arg-type]
    work = {
        "rollout": lambda: None,
        POLICY: lambda: policy.update(make_samples(), policy_gradient),
        CRITIC: lambda: critic.update(returning(make_samples()), value_loss),
        REWARD_MODEL: lambda: judge.scores(make_samples()).tolist(),
    }
    reports, results, refused = [], [], set()
    for phase in ROUNDS:
        report = swap.to_rollout(0) if phase == "rollout" else swap.to_train(phase)
        assert report.phase == phase
        reports.append({"held": report.held_bytes, "released": report.released_bytes})
        results.append(work[phase]())
        for other in work.keys() - {phase, "rollout"} if intrude else ():
            try:
                work[other]()
            except RuntimeError:
                refused.add((phase, other))
    return {"reports": reports, "results": results, "refused": refused, "served": rollout.served}


@pytest.fixture(scope="module")
def judged(tiny_w8a8, tiny_checkpoint, tmp_path_factory) -> Config:
    model = tiny_w8a8("qwen3_moe", layers=2)
    path = classifier(tiny_checkpoint("qwen3_moe", layers=2), tmp_path_factory.mktemp("judge"))
    config = dataclasses.replace(make_config({"w8a8": str(model)}), reward_model=RewardModelConfig(path=str(path)))
    # There is no engine to ask for log-probs.
    swap, rollout = SwapConfig(canary="never", checksum="always"), dataclasses.replace(config.rollout, data_parallel=1)
    return dataclasses.replace(config, swap=swap, rollout=rollout)


def held_by(report: dict[str, Any]) -> dict[str, int]:
    """Bytes held by engine."""
    held: dict[str, int] = {}
    for name, count in report["held"].items():
        held[name.partition("/")[0]] = held.get(name.partition("/")[0], 0) + count
    return held


def test_one_model_at_a_time_is_in_memory_and_none_during_rollout(one_rank, judged, tmp_path):
    found = one_rank(take_turns, judged, str(tmp_path), True)[0]
    for phase, report in zip(ROUNDS, found["reports"], strict=True):
        held = held_by(report)
        assert {name for name, count in held.items() if count} == {phase}
    # Adam's moments appeared with an update and came back the next time.
    policies = [held_by(r)[POLICY] for p, r in zip(ROUNDS, found["reports"], strict=True) if p == POLICY]
    assert policies[1] > policies[0]
    phases = (POLICY, CRITIC, REWARD_MODEL)
    assert found["refused"] == {(phase, model) for phase in ("rollout", *phases) for model in phases if model != phase}
    assert found["served"] == 3


def test_without_switches_all_stay_and_compute_the_same(one_rank, judged, tmp_path):
    turns = one_rank(take_turns, judged, str(tmp_path), True)[0]
    stay = SwapConfig(
        offload_parameters=False,
        offload_gradients=False,
        offload_optimizer=False,
        release_kv_cache=False,
        canary="never",
    )
    found = one_rank(take_turns, dataclasses.replace(judged, swap=stay), str(tmp_path), False)[0]
    assert all(count for report in found["reports"] for count in held_by(report).values())
    assert found["results"] == turns["results"]
