"""DAPO (arXiv 2503.14476): GRPO's loop, whose rollout goes on until enough groups have something to learn from."""

from __future__ import annotations

import numpy as np

from trainer.columns import DAPO
from trainer.grpo import GrpoTrainer
from trainer.selection import Selection
from trainer.stages import reward_metrics


class DapoTrainer(GrpoTrainer):
    """Dynamic sampling, for up to algorithm.sampling_rounds rollouts a step.

    DAPO's other parts are keys of the section algorithm: clip_high, loss_aggregation: token_mean,
    overlong_buffer_tokens, mask_truncated, no KL: see configs/dapo_quickstart_cpu.yaml.
    """

    stages = DAPO

    def sample(self, step: int) -> dict[str, float]:
        algorithm = self.config.algorithm
        selection, tokens = Selection(algorithm.prompts_per_step), 0.0
        rounds: list[tuple[int, dict[str, float]]] = []
        for _ in range(algorithm.sampling_rounds):
            groups = selection.missing
            if not groups:
                break
            sampled, scores = self.sample_groups(step, selection.sampled, groups)
            tokens, rounds = tokens + sampled, [*rounds, (groups, scores)]
            batch = self.dock.get("selection", groups * algorithm.samples_per_prompt, step=step)
            selection.add(batch.keys, np.array(batch.columns["rewards"]))
            self.dock.ack(batch)
        self.dock.put({"selected": np.ones(self.config.samples_per_step, np.float32)}, selection.keys)
        return {"rollout/tokens": tokens, **reward_metrics(rounds), **selection.metrics()}
