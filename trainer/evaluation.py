"""Evaluation on held-out prompts, through the engine and the rewards of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qerl_rl.config.schema import Config
from qerl_rl.data.prompts import Prompt
from trainer.shares import even_rows
from workers import WorkerGroup

_NO_STEP = 0
"""Steps count from 1, so the draws of an evaluation are none of training's."""


def evaluate(prompts: Sequence[Prompt], config: Config, workers: WorkerGroup) -> dict[str, float]:
    """Metrics `eval/...` of the policy that the rollout engines serve; the engines must have the cards.

    The draws follow from run.seed and the prompt's place alone: each evaluation of a run makes the same, which leaves
    less noise in the difference of two.
    """
    rows = even_rows(len(prompts), config.rollout.data_parallel)
    seeds = [seed_of(config.run.seed, row) for row in range(len(prompts))]
    shares = [([(prompts[row].tokens, seeds[row]) for row in part],) for part in rows]
    pending = workers.call_each("evaluate", workers.by_data_rank("rollout", shares))
    results = pending.wait(timeout_s=config.fault.rollout_timeout_s)
    answers = [result for result in results if result is not None]
    questions = [
        (prompts[row].text, [response.tolist() for response in responses], prompts[row].answer)
        for part, own in zip(rows, answers, strict=True)
        for row, responses in zip(part, own, strict=True)
    ]
    scores = workers.call_reward("evaluate", questions)
    return prefixed("eval", scores.wait(timeout_s=config.fault.rollout_timeout_s)[0])


def seed_of(seed: int, row: int) -> int:
    """The seed of the answers to the evaluation's prompt number `row`."""
    return int(np.random.SeedSequence([seed, _NO_STEP, row]).generate_state(1)[0] >> 1)


def prefixed(section: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under names of a section."""
    return {f"{section}/{name}": value for name, value in metrics.items()}
