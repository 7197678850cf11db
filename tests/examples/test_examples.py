"""The examples run as a user would run them, on a tiny model, and do what they say."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from examples.best_of_n import best_only, close, negative_log_likelihood
from examples.reinforce_leave_one_out import reward
from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.config.schema import AlgorithmConfig
from tests.trainer.runs import finished

SMALL = [
    "run.steps=2",
    "algorithm.prompts_per_step=4",
    "algorithm.samples_per_prompt=4",
    "algorithm.prompts_per_mini_batch=4",
]


def run(command: list[str], model: str, folder: Path) -> str:
    return finished([sys.executable, *command, f"model.path={model}", f"run.output_dir={folder}", *SMALL])


def test_a_loop_of_ones_own_trains(tmp_path, tiny_w8a8):
    command = ["-m", "examples.reinforce_leave_one_out", "configs/quickstart_cpu.yaml", "noise.enabled=false"]
    found = re.findall(r"^step (\d): reward (-?[\d.]+)$", run(command, tiny_w8a8("qwen3_moe"), tmp_path), re.MULTILINE)
    assert [step for step, _ in found] == ["1", "2"]
    assert all(-2.0 < float(mean) <= 1.0 for _, mean in found)


def test_functions_of_ones_own_train_in_the_ready_made_loop(tmp_path, tiny_w8a8):
    functions = [
        "algorithm.advantage=examples.best_of_n.best_only",
        "algorithm.loss=examples.best_of_n.negative_log_likelihood",
        # A random model writes no numbers for `close` to measure; length tells its answers apart.
        "reward.function=tests.trainer.reward_functions.share_of_digits",
        "noise.enabled=false",
        "checkpoint.export=false",
    ]
    run(["launch.py", "--config", "configs/quickstart_cpu.yaml", *functions], tiny_w8a8("qwen3_moe"), tmp_path)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # The chosen answers' negative log-likelihood, which grows less likely ones: above zero, and learned from.
    assert all(math.isfinite(step["policy_loss"]) and step["policy_loss"] > 0 for step in steps)
    assert all(step["grad_norm"] > 0 for step in steps)
    advantages = [sample["advantage"] for sample in map(json.loads, (tmp_path / "samples.jsonl").open())]
    assert {0.0, 1.0} == {round(value, 6) for value in advantages}


def test_the_best_of_each_group_is_chosen_and_learned_by_heart():
    rewards = torch.tensor([0.1, 0.5, 0.5, 0.2, 0.3, 0.3])
    groups = torch.tensor([4, 4, 4, 7, 9, 9])
    outcome = Outcome(rewards, groups, torch.full((6,), 2), torch.zeros(12))
    chosen = best_only(outcome, AlgorithmConfig())
    assert chosen.tolist() == [0, 1, 0, 0, 0, 0], "the first of equals; nothing where all are equal"
    log_probs = torch.linspace(-3, -1, 12, requires_grad=True)
    loss, _ = negative_log_likelihood(
        log_probs, {"advantages": chosen.repeat_interleave(2)}, torch.full((12,), 0.5), AlgorithmConfig()
    )
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * (log_probs[2] + log_probs[3]).item())
    assert log_probs.grad.tolist() == [0, 0, -0.5, -0.5] + [0] * 8


def test_the_rewards_of_the_examples():
    assert [close("", text, "12") for text in ("12", " 13", "x", "")] == [1.0, 0.5, 0.0, 0.0]
    assert [reward(text, "12") for text in ("12", "13", "125", "")] == pytest.approx([1.0, 0.5, 0.9, 0.0])
