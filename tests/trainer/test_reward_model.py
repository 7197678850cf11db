"""A whole run through launch.py that trains every weight, and whose rewards come from a model beside a function."""

import os

import pytest

from qerl_rl.config.schema import DataConfig, RewardModelConfig
from qerl_rl.rewards.model import RewardModel
from tests.rewards.tiny_models import save
from tests.trainer.runs import ROOT, launch, rows


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """Folder of a run of two steps, and that of its reward model."""
    folder = tmp_path_factory.mktemp("run")
    model = save(folder / "reward_model", "decoder")
    settings = [
        # Relative, while the workers' folder may be another.
        f"reward_model.path={os.path.relpath(model, ROOT)}",
        "reward_model.weight=-2",
        "reward.function=",
        "reward.functions={tests.trainer.reward_functions.share_of_digits: 0.0}",
        "run.steps=2",
        "algorithm.prompts_per_step=4",
        "algorithm.samples_per_prompt=4",
        "algorithm.prompts_per_mini_batch=2",
        "track.samples_per_step=16",
        "swap.canary=always",
        "swap.checksum=always",
        "train.learning_rate=3e-3",
        "eval.every=2",
        "eval.prompts=3",
    ]
    launch("grpo_full_quickstart_cpu.yaml", tiny_checkpoint("qwen3_moe", "bfloat16"), folder, *settings)
    return folder, model


def test_a_run_earns_what_the_reward_model_says(run):
    folder, model = run
    steps = rows(folder / "metrics.jsonl")
    for step in steps:
        assert step["reward/mean"] == pytest.approx(-2 * step["reward/model_mean"], abs=1e-5)
        assert step["reward/std"] > 0
        assert step["reward/failures"] == 0
        assert 0 < step["reward/tests.trainer.reward_functions.share_of_digits"] < 1
    # The function of weight 0 still judges evaluations.
    assert 0 <= steps[1]["eval/pass@1"] <= 1
    samples = rows(folder / "samples.jsonl")
    assert len(samples) == 32
    texts = [(sample["prompt"], sample["response"], "") for sample in samples]
    scores, _ = RewardModel(RewardModelConfig(path=str(model)), DataConfig()).score(texts)
    assert [sample["reward"] for sample in samples] == pytest.approx((-2 * scores).tolist(), abs=1e-5)


def test_every_weight_trains_and_the_engine_follows_in_its_own_format(run):
    folder, _ = run
    first, second = rows(folder / "metrics.jsonl")
    # The first weights stay the reference; at this learning rate the policy is soon far from them.
    assert 0.1 < first["kl/reference"] < second["kl/reference"]
    # An engine that had kept them would be as far from the trainer in the second step.
    assert second["rollout_vs_train/k3_kl"] < 0.05 * first["kl/reference"]
    assert "swap/update_survival" not in second
    ledger = [row for row in rows(folder / "swaps.jsonl") if row["phase"] == "rollout"]
    assert [(row["step"], row["rank"]) for row in ledger] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # All weights come anew each time, and nothing else: there are no adapters.
    assert len({row["moved_bytes"] for row in ledger}) == 1
    for row in ledger:
        assert row["held_bytes"]["rollout/adapters"] == 0
        assert row["held_bytes"]["train/parameters"] == 0
        assert row["checksum_bytes"] > row["moved_bytes"] > 0
        assert row["canary"] > 0
