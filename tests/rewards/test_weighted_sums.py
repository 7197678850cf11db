"""Several functions, weighted: each is judged alone, and what one does to a sample costs that part of it only."""

import textwrap

import numpy as np
import pytest

from qerl_rl.config.schema import RewardConfig
from qerl_rl.rewards.scorer import RewardScorer

GREEDY = textwrap.dedent(
    """
    kept = []

    def reward(prompt, response, answer):
        if response == "hang":
            while True:
                pass
        if response == "raise":
            raise ValueError("no such answer")
        if response == "one block":
            return len(bytearray(1 << 40))
        if response == "piece by piece":
            pieces = []
            while True:
                pieces.append("x" * 1000 + str(len(pieces)))
        if response == "small objects":
            chain = None
            while True:
                chain = [chain] * 30
        if response == "endless message":
            raise ValueError("x" * (1 << 24))
        if response == "huge":
            return 1e300
        if response == "leak":
            kept.append(bytearray(50 << 20))
        return 1.0
    """
)
MEMORY = 128 << 20
FAULTS = {
    "hang": "longer than 6 s",
    "raise": "ValueError: no such answer",
    "one block": f"more than {MEMORY} bytes",
    "piece by piece": f"more than {MEMORY} bytes",
    "small objects": f"more than {MEMORY} bytes",
    "endless message": "ValueError: xxx",
    "huge": "returned 1e+300",
}


@pytest.fixture
def greedy(tmp_path, monkeypatch):
    (tmp_path / "greedy_rewards.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "greedy_rewards.reward"


def test_the_sum_of_several_functions_is_weighted_and_each_is_reported():
    reward = RewardConfig(functions={"exact": 1.0, "format": 0.25, "length": -0.5, "step": 0.0}, length_characters=40)
    right = "<think>x</think><answer>4</answer>"
    with RewardScorer(reward) as scorer:
        scores = scorer.score([("2+2", "4", "4"), ("2+2", right, "4"), ("2+2", "x" * 80, "4")])
    assert scores.parts["exact"].tolist() == [1.0, 0.0, 0.0]
    assert scores.parts["format"].tolist() == [0.0, 1.0, 0.0]
    np.testing.assert_allclose(scores.parts["length"], [1 / 40, 34 / 40, 1.0], rtol=1e-6)
    np.testing.assert_allclose(scores.values, [1 - 0.5 / 40, 0.25 - 0.5 * 34 / 40, -0.5], rtol=1e-6)
    assert not scores.failures


def test_a_fault_costs_its_function_its_sample_and_nothing_else(greedy):
    responses = ["fine"]
    for fault in FAULTS:
        responses += [fault, "fine"]
    reward = RewardConfig(functions={greedy: 2.0, "exact": 10.0}, timeout_s=6.0, memory_bytes=MEMORY)
    with RewardScorer(reward) as scorer:
        # The other function gives each sample its 10, also those that the first fails on.
        scores = scorer.score([("p", response, response) for response in responses])
    assert scores.values.tolist() == [10.0 if response in FAULTS else 12.0 for response in responses]
    assert scores.parts["exact"].tolist() == [1.0] * len(responses)
    assert sorted(scores.failures) == [index for index, text in enumerate(responses) if text in FAULTS]
    for index, reason in scores.failures.items():
        assert FAULTS[responses[index]] in reason
        assert reason.startswith(f"{greedy}: ")
        assert len(reason) < 1000


def test_memory_that_earlier_samples_left_behind_costs_no_sample(greedy):
    with RewardScorer(RewardConfig(function=greedy, memory_bytes=MEMORY)) as scorer:
        scores = scorer.score([("p", "leak", "a")] * 7)
    # Two leaks of 50 MiB fit into 128 MiB, so that without a fresh process every third sample would fail.
    assert scores.values.tolist() == [1.0] * 7
    assert not scores.failures


def test_two_functions_that_fail_on_a_sample_are_both_named_and_count_once(greedy):
    reward = RewardConfig(functions={greedy: 1.0, "tests.trainer.reward_functions.share_of_digits": 1.0, "math": 1.0})
    with RewardScorer(reward) as scorer:
        scores = scorer.score([("p", "raise", "7"), ("p", "7", "7")])
        assert scorer.failed_samples == 1
    assert scores.values.tolist() == [0.0, 3.0]
    assert list(scores.failures) == [0]
