"""Who reads the base that a rollout engine lends, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.platform.state_store import SpillFile
from qerl_rl.reshard.ledger import CRITIC, POLICY
from tests.train.models import make_config, make_samples, start_engine
from tests.train.test_adoption import owned, stored
from tests.train.test_value_engine import returning, value_loss


class LendingRollout:
    """Stands in for the engine: what it lends, and to whom, without a model."""

    def __init__(self, experts: list[StoredExperts]) -> None:
        self._experts = experts
        self.lent: dict[str, int] = {}

    def lendable_experts(self) -> list[StoredExperts]:
        return self._experts

    def lend(self, nbytes: Mapping[str, int]) -> None:
        self.lent |= nbytes


def offer_to_two_models(path: str, folder: str) -> dict[str, Any]:
    """A policy and a critic on one base, and engines that lend nothing, half of it, other numbers, and all of it."""
    from qerl_rl.reshard.shared_base import share_base
    from qerl_rl.train.value_engine import ValueEngine

    config = make_config({"w8a8": path})
    policy = start_engine(config, store=SpillFile(folder))
    own = sum(buffer.nbytes for buffer in owned(policy))
    policy.offload()
    models = {POLICY: policy, CRITIC: ValueEngine(config, SpillFile(folder))}

    def give(name: str) -> None:
        for other in models.keys() - {name}:
            models[other].offload()
        models[name].onload()
        models[name].finish_moves()

    def offer(experts: list[StoredExperts]) -> tuple[str, LendingRollout]:
        rollout = LendingRollout(experts)
        return share_base(rollout, models, give), rollout  # type: ignore[arg-type]

    others = stored(path)
    for weight in others:
        weight.tensors[0].neg_()
    said = [offer(experts)[0] for experts in ([], stored(path, experts=range(4)), others)]
    once, rollout = offer(stored(path))
    place = [(model.is_away, len(owned(model))) for model in models.values()]
    samples = returning(make_samples())
    give(CRITIC)
    models[CRITIC].update(samples, value_loss)
    return {"said": [*said, once], "own": own, "lent": rollout.lent, "place": place}


def test_all_models_on_a_base_share_it_and_the_policy_has_the_card_then(one_rank, tiny_w8a8, tmp_path):
    found = one_rank(offer_to_two_models, str(tiny_w8a8("qwen3_moe", layers=2)), str(tmp_path))[0]
    nothing, half, different, once = found["said"]
    assert "keeps none as it was loaded" in nothing
    assert "no experts of this rank are whole and the same" in half
    assert "they disagree on 4 weights, the first model.layers.0.mlp.experts.w13" in different
    assert f"the trainer reads {2 * found['own'] / 2**20:.1f} MiB" in once
    # In the engine each weight lies once, however many read it.
    assert sum(found["lent"].values()) == found["own"]
    assert found["place"] == [(False, 0), (True, 0)]
