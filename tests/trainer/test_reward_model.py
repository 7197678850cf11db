"""A whole run through launch.py whose rewards come from a model beside a function."""

import os

import pytest

from qerl_rl.config.schema import DataConfig, RewardModelConfig
from qerl_rl.rewards.model import RewardModel
from tests.rewards.tiny_models import save
from tests.trainer.runs import ROOT, launch, rows


def test_a_run_earns_what_the_reward_model_says(tiny_w8a8, tmp_path):
    model = save(tmp_path / "reward_model", "decoder")
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
        "noise.stages=2",
        "eval.every=2",
        "eval.prompts=3",
    ]
    launch("quickstart_cpu.yaml", tiny_w8a8("qwen3_moe"), tmp_path, *settings)
    steps = rows(tmp_path / "metrics.jsonl")
    for step in steps:
        assert step["reward/mean"] == pytest.approx(-2 * step["reward/model_mean"], abs=1e-5)
        assert step["reward/std"] > 0
        assert step["reward/failures"] == 0
        assert 0 < step["reward/tests.trainer.reward_functions.share_of_digits"] < 1
    # The function of weight 0 still judges evaluations.
    assert 0 <= steps[1]["eval/pass@1"] <= 1
    samples = rows(tmp_path / "samples.jsonl")
    assert len(samples) == 32
    texts = [(sample["prompt"], sample["response"], "") for sample in samples]
    scores, _ = RewardModel(RewardModelConfig(path=str(model)), DataConfig()).score(texts)
    assert [sample["reward"] for sample in samples] == pytest.approx((-2 * scores).tolist(), abs=1e-5)
