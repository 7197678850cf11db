"""How a step gets its samples: everything of its own, what was left over before, or one step ahead of the training.

Each way is a class with the same calls, so that a loop does not know which it has (docs/rollouts.md).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qerl_rl.config.schema import RolloutConfig
from trainer.base import Trainer
from trainer.columns import column_types
from trainer.evaluation import prefixed
from trainer.shares import group_rows
from transfer_dock import Batch, Jagged, SampleKey
from workers import Pending

Metrics = dict[str, float]


class Rollouts:
    """The engines have the cards until every prompt of the step is answered; then the trainer has them.

    Args: state: what `state` gave when a checkpoint was written, else empty.
    """

    def __init__(self, trainer: Trainer, state: Metrics) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.dock, self.workers, self.recorder = trainer.dock, trainer.workers, trainer.recorder
        self.groups, self.group_size = self.config.algorithm.prompts_per_step, self.config.algorithm.samples_per_prompt

    def roll_out(self, step: int) -> Metrics:
        """Have what the step learns from sampled and scored, and evaluate; afterwards the trainer can work."""
        self.trainer.swap("swap_to_rollout", step)
        metrics = {**self.sample(step), **self.trainer.evaluate(step)}
        self.trainer.give_cards_to_trainer(step)
        return metrics

    def sample(self, step: int) -> Metrics:
        """Answers to what the step learns from, and their scores; the engines have the cards."""
        tokens, scores = self.sample_groups(step, 0, self.groups)
        return {"rollout/tokens": tokens, **reward_metrics([(self.groups, scores)])}

    def state(self) -> Metrics:
        """What has to be known to go on from a checkpoint, beside what is in the dock; nothing is under way then."""
        return {}

    # ---- what the ways share

    def sample_groups(self, step: int, first_group: int, groups: int) -> tuple[float, Metrics]:
        """Answer and score `groups` new prompts; returns the tokens of all responses, and the scores' means."""
        self.put_prompts(step, first_group, groups)
        samples = groups * self.group_size
        with self.recorder.phase("rollout"):
            scoring = self.workers.call_reward("score", self.dock, samples)
            results = self.generate(step, samples)
        return sum(result["tokens"] for result in results), self.scores(scoring)

    def scores(self, scoring: Pending) -> Metrics:
        """The means of what the reward worker was asked to score."""
        with self.recorder.phase("reward"):
            return scoring.wait(timeout_s=self.config.fault.rollout_timeout_s)[0]

    def put_prompts(self, step: int, first_group: int, groups: int) -> None:
        """One row a sample: the prompt is repeated for each of its group."""
        prompts = [p for p in self.trainer.plan.prompts.next(groups) for _ in range(self.group_size)]
        keys = [
            SampleKey(step, first_group + row // self.group_size, row % self.group_size) for row in range(len(prompts))
        ]
        columns = {
            "prompts": Jagged.from_rows([prompt.tokens for prompt in prompts]),
            "prompt_texts": [prompt.text for prompt in prompts],
            "answers": [prompt.answer for prompt in prompts],
        }
        self.dock.put({**columns, **self.beginnings(len(keys))}, keys)

    def beginnings(self, samples: int) -> dict[str, Any]:
        """More columns of new prompts."""
        return {}

    def deal(self, step: int, samples: int) -> tuple[Batch, list[Batch | None]]:
        """A lease on the `samples` prompts that wait, and the share of each worker."""
        prompts = self.dock.get("rollout", samples, whole_groups=True, step=step)
        leases = prompts.split(group_rows(prompts.keys, self.config.rollout.data_parallel))
        return prompts, self.workers.by_data_rank("rollout", [lease if lease.keys else None for lease in leases])

    def generate(self, step: int, samples: int, *arguments: Any) -> list[dict[str, Any]]:
        """Answer the `samples` prompts that wait; returns the figures of each worker."""
        prompts, shares = self.deal(step, samples)
        pending = self.workers.call_each("generate", [(self.dock, share, *arguments) for share in shares])
        results = self.wait(pending, samples)
        self.dock.ack(prompts)
        return results

    def wait(self, pending: Pending, samples: int) -> list[Any]:
        """Results of the engines, showing how far they are meanwhile."""

        def show() -> None:
            self.recorder.progress(self.dock.status()["columns"]["responses"], samples)

        return pending.wait(timeout_s=self.config.fault.rollout_timeout_s, on_wait=show)


class CarriedRollouts(Rollouts):
    """Partial rollout: the engines stop when a step's groups are complete, the others go on in the next step.

    rollout.carry_prompts more groups than a step learns from are in flight. What is left of a step becomes the first
    groups of the next one, under its keys, with the responses so far as the columns partial_*.
    """

    def sample(self, step: int) -> Metrics:
        more, size = self.config.rollout.carry_prompts, self.group_size
        carried = self.dock.status()["samples"] // size
        in_flight = self.groups + more
        self.put_prompts(step, carried, in_flight - carried)
        with self.recorder.phase("rollout"):
            scoring = self.workers.call_reward("score", self.dock, self.groups * size)
            results = self.generate(step, in_flight * size, self.groups // self.config.rollout.data_parallel)
            self.carry_over(step, more * size)
        ages = [age for result in results for age in result["ages"]]
        return {
            "rollout/tokens": sum(result["tokens"] for result in results),
            "rollout/carried": float(sum(result["unfinished"] for result in results)),
            "rollout/age_mean": float(np.mean(ages)),
            "rollout/age_max": float(max(ages)),
            **reward_metrics([(self.groups, self.scores(scoring))]),
        }

    def beginnings(self, samples: int) -> dict[str, Any]:
        nothing = [np.empty(0, np.int32)] * samples, [np.empty(0, np.float32)] * samples
        partials = {
            "partial_responses": Jagged.from_rows(nothing[0]),
            "partial_log_probs": Jagged.from_rows(nothing[1]),
        }
        if self.config.router_replay.is_on:
            model, dtype = self.trainer.plan.architecture, column_types(self.config)["routed_experts"]
            no_experts = np.empty((0, model.layers, model.experts_per_token), dtype)
            partials["partial_routed_experts"] = Jagged.from_rows([no_experts] * samples)
        return {**partials, "ages": np.zeros(samples, np.int32)}

    def carry_over(self, step: int, samples: int) -> None:
        """Make the `samples` that are left the first groups of the next step, one step older."""
        batch = self.dock.get("carry", samples, whole_groups=True, step=step)
        numbers = {group: number for number, group in enumerate(dict.fromkeys(key.group for key in batch.keys))}
        columns = {
            **{name: batch.columns[name] for name in ("prompts", "prompt_texts", "answers")},
            "partial_responses": batch.columns["left_responses"],
            "partial_log_probs": batch.columns["left_log_probs"],
            "ages": batch.columns["ages"] + np.int32(1),
        }
        if self.config.router_replay.is_on:
            columns["partial_routed_experts"] = batch.columns["left_routed_experts"]
        self.dock.put(columns, [SampleKey(step + 1, numbers[key.group], key.index) for key in batch.keys])
        self.dock.ack(batch)


class AheadRollouts(Rollouts):
    """One step off-policy: while a step trains, the engines sample for the next one; neither leaves memory.

    The samples of step k + 1 come from the policy that step k's update starts from. The first step has nothing to
    overlap with, the last samples nothing ahead.
    """

    def __init__(self, trainer: Trainer, state: Metrics) -> None:
        super().__init__(trainer, state)
        self._sampled = dict(state)
        """Metrics of samples that are complete, in the dock, and wait for their step."""
        self._under_way: tuple[Batch, Pending] | None = None

    def roll_out(self, step: int) -> Metrics:
        if not self._sampled and not self._under_way:
            self.trainer.swap("publish", step)
            self._start(step)
        self._finish()
        metrics, self._sampled = self._sampled, {}
        self.trainer.swap("publish", step + 1)
        metrics |= self.trainer.evaluate(step)
        if step < self.config.run.steps:
            self._start(step + 1)
        return metrics

    def state(self) -> Metrics:
        self._finish()
        return self._sampled

    def _finish(self) -> None:
        """Wait for the samples that are under way, if there are any, and their scores."""
        if self._under_way is None:
            return
        (prompts, scoring), self._under_way = self._under_way, None
        with self.recorder.phase("rollout"):
            results = self.wait(self.workers.call("finish_generation"), len(prompts))
            self.dock.ack(prompts)
        tokens = sum(result["tokens"] for result in results)
        self._sampled = {
            "rollout/tokens": tokens,
            # Of the engines' own time: the step waited for less.
            "tokens_per_s/rollout": tokens / max(result["seconds"] for result in results),
            **reward_metrics([(self.groups, self.scores(scoring))]),
        }

    def _start(self, step: int) -> None:
        """Have the samples of `step` drawn and scored in the background."""
        samples = self.groups * self.group_size
        self.put_prompts(step, 0, self.groups)
        prompts, shares = self.deal(step, samples)
        scoring = self.workers.call_reward("score", self.dock, samples)
        pending = self.workers.call_each("start_generation", [(self.dock, share, step) for share in shares])
        pending.wait(timeout_s=self.config.fault.rollout_timeout_s)
        self._under_way = prompts, scoring


def rollouts_type(rollout: RolloutConfig) -> type[Rollouts]:
    """The way that the launch file asks for."""
    if rollout.carry_prompts:
        return CarriedRollouts
    return AheadRollouts if rollout.ahead else Rollouts


def reward_metrics(rounds: list[tuple[int, Metrics]]) -> Metrics:
    """Of the groups and scores of each sampling round: all failures, and the means over all samples."""
    groups = sum(count for count, _ in rounds)
    names = [name for name in rounds[0][1] if name != "failures"]
    means = {name: sum(count * scores[name] for count, scores in rounds) / groups for name in names}
    return prefixed("reward", {"failures": sum(scores["failures"] for _, scores in rounds), **means})
