"""The reward worker: scores finished groups while the rest is still being rolled out."""

from __future__ import annotations

import resource
from typing import Any

from qerl_rl.config.loader import from_dict
from transfer_dock import TransferDock


class RewardWorker:
    """Reads the dock as consumer `reward`, decodes responses, writes the columns rewards and response_texts.

    Args: config: the launch configuration as `dataclasses.asdict` gives it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        from transformers import AutoTokenizer

        from qerl_rl.rewards.scorer import RewardScorer

        self.config = from_dict(config)
        self.tokenizer = AutoTokenizer.from_pretrained(self.config.model.path)
        reward = self.config.reward
        self.scorer = RewardScorer(reward.function, processes=reward.workers, timeout_s=reward.timeout_s)

    def score(self, dock: TransferDock, samples: int) -> dict[str, float]:
        """Score the next `samples` samples, group by group as they finish; returns how many the function failed on."""
        group_size = self.config.algorithm.samples_per_prompt
        failures, done = 0, 0
        while done < samples:
            batch = dock.get(
                "reward",
                samples - done,
                whole_groups=True,
                minimum=group_size,
                timeout=self.config.fault.rollout_timeout_s,
            )
            texts = self.tokenizer.batch_decode(list(batch.columns["responses"].rows()), skip_special_tokens=True)
            problems = list(zip(batch.columns["prompt_texts"], texts, batch.columns["answers"], strict=True))
            scores = self.scorer.score(problems)
            dock.put({"rewards": scores.values, "response_texts": texts}, batch.keys)
            dock.ack(batch)
            failures += len(scores.failures)
            done += len(batch.keys)
        return {"failures": float(failures)}

    def score_texts(self, problems: list[tuple[str, list[int], str]]) -> list[float]:
        """Rewards of (prompt text, response tokens, answer) rows that do not travel through the dock (evaluation)."""
        texts = self.tokenizer.batch_decode([tokens for _, tokens, _ in problems], skip_special_tokens=True)
        rows = [(prompt, text, answer) for (prompt, _, answer), text in zip(problems, texts, strict=True)]
        return self.scorer.score(rows).values.tolist()

    def peak_bytes(self) -> int:
        """The most memory this process has held, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
