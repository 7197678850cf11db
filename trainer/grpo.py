"""GRPO (DeepSeekMath, arXiv 2402.03300): the loop, stage by stage."""

from __future__ import annotations

from trainer.columns import GRPO
from trainer.stages import PolicyTrainer


class GrpoTrainer(PolicyTrainer):
    """Learns from how much better a sample is than the others of its prompt.

    algorithm.advantage and algorithm.loss make the same loop Dr. GRPO, RLOO, REINFORCE++, GSPO or CISPO.
    """

    stages = GRPO

    def step(self, step: int) -> dict[str, float]:
        rollout = self.roll_out(step)
        policy = self.log_probs(step)
        rewards = self.advantages(step)
        update = self.update(step)
        self.dock.close_step(step, carry_unfinished=False)
        return {**rollout, **rewards, **policy, **update}
