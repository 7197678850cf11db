"""Which columns a run's dock has, and who reads them."""

import json

import pytest

from qerl_rl.config.schema import AlgorithmConfig, Config, LoraConfig, ModelConfig, RouterReplayConfig
from trainer.columns import CARRIED, DAPO, GRPO, PPO, column_types, stages_of, with_routing


@pytest.mark.parametrize("stages", [GRPO, DAPO, PPO], ids=["grpo", "dapo", "ppo"])
def test_the_policys_passes_read_the_engines_experts_and_no_other_model_does(stages):
    routed = with_routing(stages)
    assert {stage for stage, columns in routed.items() if "routed_experts" in columns} == {"log_probs", "update"}
    assert all(set(routed[stage]) - set(columns) <= {"routed_experts"} for stage, columns in stages.items())


def test_what_is_carried_over_keeps_the_experts_of_finished_samples():
    routed = with_routing({**GRPO, **CARRIED})
    assert "partial_routed_experts" in routed["rollout"]
    assert "left_routed_experts" in routed["carry"]
    assert "partial_routed_experts" not in with_routing(GRPO)["rollout"]


@pytest.mark.parametrize(("experts", "kind"), [(256, "uint8"), (257, "int16")])
def test_experts_are_numbered_in_a_byte_while_they_fit(tmp_path, tiny_checkpoint, experts, kind):
    config = json.loads((tiny_checkpoint("qwen3_moe") / "config.json").read_text())
    config = {name: value for name, value in config.items() if name != "num_local_experts"} | {"num_experts": experts}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = Config(model=ModelConfig(path=str(tmp_path)), router_replay=RouterReplayConfig(mode="R3"))
    names = [name for name in column_types(run) if name.endswith("routed_experts")]
    assert {column_types(run)[name] for name in names} == {kind}


@pytest.mark.parametrize(
    ("keys", "reads"),
    [
        ({"lora": LoraConfig(rank=16)}, True),
        ({"lora": LoraConfig(rank=0)}, False),
        ({"lora": LoraConfig(rank=0), "algorithm": AlgorithmConfig(kl_coefficient=0.1)}, True),
    ],
    ids=["adapters", "everything", "everything with a KL"],
)
def test_reference_log_probs_are_a_column_where_there_is_a_reference(keys, reads):
    """Nobody would write them where every weight trains and nothing learns from a KL."""
    stages = stages_of(Config(**keys), GRPO)
    for stage in ("advantages", "update"):
        assert set(GRPO[stage]) - set(stages[stage]) == (set() if reads else {"reference_log_probs"})
