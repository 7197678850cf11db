"""PPO (arXiv 1707.06347) with a critic on the policy's cards: the loop, stage by stage."""

from __future__ import annotations

import torch

from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.algorithms.ppo import explained_variance, ppo_advantages
from qerl_rl.reshard.ledger import CRITIC
from trainer.columns import PPO
from trainer.outcome import flat_column
from trainer.shares import update_shares
from trainer.stages import PolicyTrainer, mean_metrics, trained_tokens
from transfer_dock import Batch

CRITIC_METRICS = {
    "loss": "critic/loss",
    "grad_norm": "critic/grad_norm",
    "learning_rate": "critic/learning_rate",
    "value": "critic/value_mean",
    "value_clip_fraction": "critic/clip_fraction",
}
"""Names in the metrics of what an update of the critic returns."""


class PpoTrainer(PolicyTrainer):
    """Learns from how much better a token turned out than the critic expected of the text before it."""

    stages = PPO

    def step(self, step: int) -> dict[str, float]:
        metrics = {**self.roll_out(step), **self.log_probs(step)}
        self.swap("swap_to_train", CRITIC)
        self.values(step)
        metrics |= self.advantages(step)
        metrics |= self.update_critic(step)
        if step > self.config.critic.head_start_steps:
            self.swap("swap_to_train")
            tokens = metrics["train/tokens"]
            metrics |= self.update(step)
            metrics["train/tokens"] += tokens
        self.dock.close_step(step, carry_unfinished=False)
        return metrics

    def values(self, step: int) -> None:
        """What the critic expects, before each response token."""
        with self.recorder.phase("values"):
            self.run_stage("values", step)

    def judge(self, outcome: Outcome, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        algorithm = self.config.algorithm
        values = flat_column(batch, "values")
        advantages, returns = ppo_advantages(outcome, values, discount=algorithm.discount, decay=algorithm.gae_lambda)
        columns = {"advantages": advantages, "returns": returns}
        return columns, {"critic/explained_variance": explained_variance(values, returns)}

    def update_critic(self, step: int) -> dict[str, float]:
        """As `update`, on the same mini-batches."""
        with self.recorder.phase("update"):
            batch = self.lease("update_critic", step)
            rows = self.mini_batches(batch, step)
            shares = update_shares(batch, rows, self.config.train_data_parallel)
            metrics = mean_metrics(self.on_train_ranks("update_critic", shares)[0]) if rows else {}
            self.dock.ack(batch)
        named = {name: metrics[own] for own, name in CRITIC_METRICS.items() if own in metrics}
        return {**named, "train/tokens": trained_tokens(batch, rows)}
