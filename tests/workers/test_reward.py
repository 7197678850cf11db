"""The reward worker's evaluation, with real text, functions and processes, against figures counted by hand."""

import dataclasses

import pytest

from qerl_rl.config.schema import Config, EvalConfig, ModelConfig, RewardConfig
from workers.reward import RewardWorker


class Words:
    """Stands in for a tokenizer: the text of token i."""

    def __init__(self, texts):
        self._texts = texts

    def batch_decode(self, responses, *, skip_special_tokens):
        assert skip_special_tokens
        return ["".join(self._texts[token] for token in response) for response in responses]


@pytest.fixture
def worker_of(tiny_w8a8):
    workers = []

    def make(texts, reward, **evaluation):
        config = Config(
            model=ModelConfig(path=str(tiny_w8a8("qwen3_moe"))), reward=reward, eval=EvalConfig(**evaluation)
        )
        workers.append(RewardWorker(dataclasses.asdict(config)))
        workers[-1].tokenizer = Words(texts)
        return workers[-1]

    yield make
    for worker in workers:
        worker.scorer.close()


def test_majority_and_pass_rates_of_math_answers(worker_of):
    texts = ["\\boxed{1/2}", "so 0.5", "it is 3", "#### 3.0", "no idea"]
    reward = RewardConfig(functions={"length": 0.001, "math": 1.0}, timeout_s=60.0, length_characters=1000)
    worker = worker_of(texts, reward, every=1, samples=3)
    metrics = worker.evaluate(
        [
            # Two of three say a half: the majority is right.
            ("p", [[0], [2], [1]], "0.5"),
            # Two of three say 3: the majority is wrong, though the first answer is right.
            ("q", [[0], [3], [2]], "0.5"),
            # One vote only, and it is right: who has no answer has no vote.
            ("r", [[4], [4], [2]], "3"),
            # Nobody votes.
            ("s", [[4], [4], [4]], "3"),
        ]
    )
    lengths = sum(len(texts[token]) for token in (0, 2, 1, 0, 3, 2, 4, 4, 2, 4, 4, 4))
    expected = {
        "avg@3": 4 / 12,
        "maj@3": 2 / 4,
        "pass@1": 4 / 12,
        "pass@2": (1 + 2 / 3 + 2 / 3 + 0) / 4,
        "pass@3": 3 / 4,
        "reward_mean": 4 / 12 + 0.001 * lengths / 12000,
        "failures": 0.0,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_one_answer_gives_pass_at_1_and_correct_at_sets_the_bar(worker_of):
    reward = RewardConfig(function="tests.trainer.reward_functions.share_of_digits", timeout_s=60.0)
    questions = [("p", [[0]], "a"), ("p", [[1]], "a"), ("p", [[2]], "a"), ("p", [[0, 1]], "a")]
    for bar, passed in ((1.0, 0.25), (0.5, 0.75), (0.6, 0.25)):
        worker = worker_of(["7", "x", "1a"], reward, every=1, correct_at=bar)
        assert worker.evaluate(questions) == pytest.approx({"pass@1": passed, "reward_mean": 0.5, "failures": 0.0})
