"""Which answers are scored against which prompts, whatever the number of ranks."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from qerl_rl.config.schema import Config, RolloutConfig
from qerl_rl.data.prompts import Prompt
from trainer.evaluation import evaluate, seed_of
from transfer_dock import Jagged, SampleKey
from workers.batches import group_requests
from workers.group import Pending


class Done(Pending):
    def __init__(self, results):
        self._results = results

    def wait(self, *, timeout_s, on_wait=None):
        return self._results


class EchoingWorkers:
    """Two tensor ranks an engine; an answer repeats its prompt, its seed and the number of the sample."""

    def __init__(self, engines):
        self._engines, self.questions = engines, None

    def by_data_rank(self, layout, shares):
        assert layout == "rollout"
        return [share for share in shares for _ in range(2)]

    def call_each(self, method, arguments):
        assert method == "evaluate"
        assert len(arguments) == 2 * self._engines
        results = [
            [[np.append(prompt, [seed, sample]) for sample in range(3)] for prompt, seed in share]
            if rank % 2 == 0
            else None
            for rank, (share,) in enumerate(arguments)
        ]
        return Done(results)

    def call_reward(self, method, questions):
        assert method == "evaluate"
        self.questions = questions
        return Done([{"maj@3": 0.5}])


@pytest.mark.parametrize("engines", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_each_answer_is_scored_against_its_own_prompt(engines, count):
    config = dataclasses.replace(Config(), rollout=RolloutConfig(data_parallel=engines))
    prompts = [Prompt(i, f"text {i}", np.array([i, i], dtype=np.int32), f"answer {i}") for i in range(count)]
    workers = EchoingWorkers(engines)
    assert evaluate(prompts, config, workers) == {"eval/maj@3": 0.5}
    expected = [
        (f"text {i}", [[i, i, seed_of(config.run.seed, i), sample] for sample in range(3)], f"answer {i}")
        for i in range(count)
    ]
    assert sorted(workers.questions) == expected


def test_evaluation_draws_other_numbers_than_training():
    keys = [SampleKey(step, group, 0) for step in range(1, 6) for group in range(40)]
    training = set()
    for step in range(1, 6):
        own = [key for key in keys if key.step == step]
        prompts = Jagged.from_rows([np.zeros(1, dtype=np.int32)] * len(own))
        requests, _ = group_requests(SimpleNamespace(keys=own, columns={"prompts": prompts}), 1, RolloutConfig())
        training |= {request.seed for request in requests}
    evaluation = {seed_of(1, row) for row in range(200)}
    assert len(training) == len(evaluation) == 200
    assert not training & evaluation
