"""The reward worker's evaluation, with real text, functions and processes, against figures counted by hand."""

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import (
    AlgorithmConfig,
    Config,
    EvalConfig,
    ModelConfig,
    RewardConfig,
    RewardModelConfig,
    RunConfig,
)
from qerl_rl.rewards.scorer import Scores
from tests.rewards.tiny_models import save
from transfer_dock import Jagged, SampleKey
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


class Arrivals:
    """Stands in for the dock: of 4 groups of 2 samples, each `get` finds those of `orders` that have come by then."""

    def __init__(self, orders):
        self.coming, self.there = [list(groups) for groups in orders], []
        self.gets, self.rewards = 0, {}

    def get(self, consumer, count, *, whole_groups, minimum, timeout):
        self.gets += 1
        while 2 * len(self.there) < minimum:
            self.there += self.coming.pop(0)
        keys = [SampleKey(1, group, index) for group in sorted(self.there) for index in range(2)]
        self.there = []
        columns = {
            "responses": Jagged.from_rows([np.arange(3 + 5 * key.group + key.index) % 7 for key in keys]),
            "prompt_texts": ["sum:"] * len(keys),
            "answers": ["1"] * len(keys),
        }
        return SimpleNamespace(keys=keys, columns=columns)

    def put(self, columns, keys):
        self.rewards |= dict(zip(keys, columns["rewards"].tolist(), strict=True))

    def ack(self, batch):
        pass


ORDERS = ([[0, 1, 2, 3]], [[3], [1, 0], [2]], [[1], [3], [0], [2]])


def test_means_do_not_depend_on_which_group_is_done_first(worker_of, monkeypatch):
    worker = worker_of("abcdefg", RewardConfig(functions={"length": 1.0}, timeout_s=60.0))
    worker.config = replace(worker.config, algorithm=AlgorithmConfig(samples_per_prompt=2))
    # In float64, 2^60 swallows what is added to it one by one.
    values = np.array([2.0**60, 1.0, -(2.0**60), 0.5, 3.0, 2.0**53, 1.5, 0.25], np.float32)

    def scores(problems):
        rows = [2 * ((len(text) - 3) // 5) + (len(text) - 3) % 5 for _, text, _ in problems]
        return Scores(values[rows], {"length": values[rows]}, {})

    monkeypatch.setattr(worker, "_scores", scores)
    docks = [Arrivals(orders) for orders in ORDERS]
    found = [worker.score(dock, 8) for dock in docks]
    assert found[0] == found[1] == found[2]
    assert [dock.gets for dock in docks] == [1, 3, 4], "each group is scored when it comes"
    assert sum(values[[6, 7, 2, 3, 0, 1, 4, 5]].tolist()) != sum(values.tolist())


def test_a_deterministic_run_gives_a_reward_model_the_same_batches_again(tiny_w8a8, tmp_path):
    config = Config(
        run=RunConfig(deterministic=True),
        model=ModelConfig(path=str(tiny_w8a8("qwen3_moe"))),
        algorithm=AlgorithmConfig(samples_per_prompt=2),
        reward=RewardConfig(functions={"length": 0.0}, timeout_s=60.0),
        reward_model=RewardModelConfig(path=str(save(tmp_path, "decoder"))),
    )
    worker = RewardWorker(dataclasses.asdict(config))
    torch.use_deterministic_algorithms(False)
    worker.tokenizer = Words("abcdefg")
    docks = [Arrivals(orders) for orders in ORDERS]
    found = [worker.score(dock, 8) for dock in docks]
    worker.scorer.close()
    assert [dock.gets for dock in docks] == [1, 1, 1]
    assert found[0] == found[1] == found[2]
    assert docks[0].rewards == docks[1].rewards == docks[2].rewards
    assert len(set(docks[0].rewards.values())) > 1
