"""The reward worker: scores finished groups while the rest is still being rolled out."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

from qerl_rl.config.loader import from_dict
from qerl_rl.metrics.accuracy import accuracy_metrics
from qerl_rl.rewards.model import MODEL, RewardModel
from qerl_rl.rewards.scorer import RewardScorer, Sample, Scores
from qerl_rl.rewards.votes import SAME_VALUE, comparison_of, group_answers, judge_of
from qerl_rl.start_up import collector_paused
from transfer_dock import SampleKey, TransferDock


class RewardWorker:
    """Reads the dock as consumer `reward`, decodes responses, writes the columns rewards and response_texts.

    Args: config: the launch configuration as `dataclasses.asdict` gives it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        with collector_paused():
            from transformers import AutoTokenizer

        self.config = from_dict(config)
        self.tokenizer = AutoTokenizer.from_pretrained(self.config.model.path)
        self.judge = judge_of(self.config.reward.weights)
        votes_by_value = self.config.eval.every and self.config.eval.samples > 1 and comparison_of(self.judge).by_value
        self.scorer = RewardScorer(self.config.reward, [SAME_VALUE] if votes_by_value else [])
        own = self.config.reward_model
        self.model = RewardModel(own, self.config.data) if own.path and own.backend == "hf" else None
        if self.model is not None and self.config.run.deterministic:
            from qerl_rl.platform.determinism import compute_deterministically

            compute_deterministically()

    def score(self, dock: TransferDock, samples: int) -> dict[str, float]:
        """Score the next `samples` samples, group by group as they finish.

        Returns: `failures` (samples that a function failed on) and the mean of each function, by its name; `model_mean`
            where there is a reward model.
        """
        group_size = self.config.algorithm.samples_per_prompt
        # A model's score of a text depends, in its last bits, on the texts beside it: on who is done by then.
        alone = self.config.run.deterministic and self.model is not None
        failures, done = 0, 0
        parts: dict[str, dict[SampleKey, float]] = {}
        while done < samples:
            batch = dock.get(
                "reward",
                samples - done,
                whole_groups=True,
                minimum=samples if alone else group_size,
                timeout=self.config.fault.rollout_timeout_s,
            )
            texts = self.tokenizer.batch_decode(list(batch.columns["responses"].rows()), skip_special_tokens=True)
            problems = list(zip(batch.columns["prompt_texts"], texts, batch.columns["answers"], strict=True))
            scores = self._scores(problems)
            dock.put({"rewards": scores.values, "response_texts": texts}, batch.keys)
            dock.ack(batch)
            failures += len(scores.failures)
            done += len(batch.keys)
            for name, part in scores.parts.items():
                parts.setdefault(name, {}).update(zip(batch.keys, part.tolist(), strict=True))
        # In one order, whichever group was done first: sums of floats depend on it.
        means = {name: sum(part for _, part in sorted(found.items())) / done for name, found in parts.items()}
        return {"failures": float(failures), **means}

    def evaluate(self, questions: list[tuple[str, list[list[int]], str]]) -> dict[str, float]:
        """Metrics of (prompt text, tokens of each response, answer) questions that do not travel through the dock.

        Every question has equally many responses; see `accuracy_metrics` for the names, to which `reward_mean` and
        `failures` come.
        """
        texts = [self.tokenizer.batch_decode(responses, skip_special_tokens=True) for _, responses, _ in questions]
        prompts = [(prompt, own) for (prompt, _, _), own in zip(questions, texts, strict=True)]
        rows = [
            (prompt, text, answer) for (prompt, _, answer), own in zip(questions, texts, strict=True) for text in own
        ]
        scores = self._scores(rows)
        correct = scores.parts[self.judge].reshape(len(questions), -1) >= self.config.eval.correct_at
        votes = self.config.eval.samples > 1
        groups = group_answers(prompts, comparison_of(self.judge), self.scorer) if votes else []
        metrics = accuracy_metrics(correct, groups)
        return {**metrics, "reward_mean": float(scores.values.mean()), "failures": float(len(scores.failures))}

    def _scores(self, samples: Sequence[Sample]) -> Scores:
        """What the functions give, and the reward model beside them."""
        scores = self.scorer.score(samples)
        if self.model is None:
            return scores
        return scores.plus(MODEL, self.config.reward_model.weight, *self.model.score(samples))

    def peak_bytes(self) -> int:
        """The most memory this process has held, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
