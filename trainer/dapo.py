"""DAPO (arXiv 2503.14476): GRPO's loop, whose rollout goes on until enough groups have something to learn from."""

from __future__ import annotations

import numpy as np

from trainer.columns import DAPO
from trainer.grpo import GrpoTrainer
from trainer.rollouts import Metrics, Rollouts, reward_metrics
from trainer.selection import Selection


class DynamicRollouts(Rollouts):
    """Dynamic sampling, for up to algorithm.sampling_rounds rollouts a step."""

    def sample(self, step: int) -> Metrics:
        selection, tokens = Selection(self.groups), 0.0
        rounds: list[tuple[int, Metrics]] = []
        for _ in range(self.config.algorithm.sampling_rounds):
            groups = selection.missing
            if not groups:
                break
            sampled, scores = self.sample_groups(step, selection.sampled, groups)
            tokens, rounds = tokens + sampled, [*rounds, (groups, scores)]
            batch = self.dock.get("selection", groups * self.group_size, step=step)
            selection.add(batch.keys, np.array(batch.columns["rewards"]))
            self.dock.ack(batch)
        self.dock.put({"selected": np.ones(self.config.samples_per_step, np.float32)}, selection.keys)
        return {"rollout/tokens": tokens, **reward_metrics(rounds), **selection.metrics()}


class DapoTrainer(GrpoTrainer):
    """DAPO's other parts are keys of the section algorithm: clip_high, loss_aggregation: token_mean,
    overlong_buffer_tokens, mask_truncated, no KL: see configs/dapo_quickstart_cpu.yaml.
    """

    stages = DAPO

    def rollouts_type(self) -> type[Rollouts]:
        return DynamicRollouts
