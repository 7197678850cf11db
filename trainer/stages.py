"""The stages that loops with a rollout share: each reads its columns from the dock and writes its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.algorithms.choices import advantages_by_token
from qerl_rl.algorithms.correction import with_effective_share
from qerl_rl.algorithms.dapo import kept_samples
from qerl_rl.algorithms.kl import next_kl_coefficient
from qerl_rl.algorithms.mismatch import finish_mismatch
from qerl_rl.algorithms.sequences import sequence_ids, sequence_means
from qerl_rl.reshard.ledger import REWARD_MODEL
from trainer.base import Trainer
from trainer.outcome import step_outcome
from trainer.preflight import Plan
from trainer.recorder import RunRecorder
from trainer.rollouts import Rollouts, rollouts_type
from trainer.shares import kept_rows, mini_batch_rows, update_shares
from transfer_dock import Batch, Jagged
from workers import WorkerGroup


class PolicyTrainer(Trainer):
    """A loop that samples from its policy and learns from what the samples earned."""

    def __init__(self, plan: Plan, workers: WorkerGroup, recorder: RunRecorder) -> None:
        super().__init__(plan, workers, recorder)
        state = plan.resume.state["algorithm"] if plan.resume else {}
        self.kl_coefficient = state.get("kl_coefficient", plan.config.algorithm.kl_coefficient)
        """Of the next update; algorithm.kl_target steers it."""
        self.rollouts = self.rollouts_type()(self, state.get("rollouts", {}))

    def state(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient, "rollouts": self.rollouts.state()}

    def rollouts_type(self) -> type[Rollouts]:
        """How a step gets its samples."""
        return rollouts_type(self.config.rollout)

    def roll_out(self, step: int) -> dict[str, float]:
        """Have what the step learns from sampled and scored, and evaluate; afterwards the trainer can work."""
        return self.rollouts.roll_out(step)

    def give_cards_to_trainer(self, step: int) -> None:
        """A reward model on the cards comes first: it has to see what was sampled."""
        if self.config.reward_model.on_the_cards:
            self.swap("swap_to_train", REWARD_MODEL)
            self.model_scores(step)
        super().give_cards_to_trainer(step)

    def model_scores(self, step: int) -> None:
        """What the reward model on the cards thinks of the samples."""
        with self.recorder.phase("reward"):
            self.run_stage("model_scores", step)

    # ---- learning

    def log_probs(self, step: int) -> dict[str, float]:
        """Old and reference log-probs of what the step learns from."""
        with self.recorder.phase("log_probs"):
            results = self.run_stage("log_probs", step, step)
            found = token_weighted([result for result in results if result])
            return finish_mismatch(with_effective_share(found))

    def advantages(self, step: int) -> dict[str, float]:
        """An advantage a token, from what the samples earned."""
        with self.recorder.phase("reward"):
            batch = self.lease("advantages", step)
            outcome, metrics = step_outcome(self.config, batch, self.kl_coefficient)
            columns, more = self.judge(outcome, batch)
            ends = outcome.lengths.cumsum(0)[:-1].numpy()
            self.dock.put(
                {name: Jagged.from_rows(np.split(flat.numpy(), ends)) for name, flat in columns.items()}, batch.keys
            )
            means = sequence_means(columns["advantages"], sequence_ids(outcome.lengths), len(batch.keys))
            self.recorder.samples(step, batch, means.numpy())
            self.dock.ack(batch)
            return {**metrics, **more}

    def judge(self, outcome: Outcome, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Columns float32 [T] over the tokens of the batch, `advantages` among them, and metrics of their own."""
        return {"advantages": advantages_by_token(outcome, self.config.algorithm)}, {}

    def update(self, step: int) -> dict[str, float]:
        """One optimizer update a mini-batch, algorithm.epochs_per_step times over all samples."""
        with self.recorder.phase("update"):
            batch = self.lease("update", step)
            rows = self.mini_batches(batch, step)
            metrics = self._update_on(batch, rows, step) if rows else {}
            self.dock.ack(batch)
            return {**metrics, "train/tokens": trained_tokens(batch, rows)}

    def mini_batches(self, batch: Batch, step: int) -> list[list[int]]:
        """The rows of each optimizer update; which they are follows from the run's seed and the step."""
        algorithm = self.config.algorithm
        random = np.random.default_rng([self.config.run.seed, step])
        rows = mini_batch_rows(batch.keys, algorithm.prompts_per_mini_batch, algorithm.epochs_per_step, random)
        if algorithm.mask_truncated:
            kept = kept_samples(torch.from_numpy(np.array(batch.columns["truncated"]))).tolist()
            rows = kept_rows(rows, kept)
        return rows

    def _update_on(self, batch: Batch, rows: list[list[int]], step: int) -> dict[str, float]:
        """One optimizer update on each list of rows; their mean metrics."""
        algorithm = self.config.algorithm
        shares = update_shares(batch, rows, self.config.train_data_parallel)
        results = self.on_train_ranks("update", shares, lambda share: (share, step, self.kl_coefficient))
        metrics = mean_metrics(results[0])
        if not self.config.rollout_correction.bypass_mode:
            # The entropy of a step is that of the policy before the update; later mini-batches see a newer one.
            metrics.pop("entropy", None)
        metrics["kl/coefficient"] = self.kl_coefficient
        if algorithm.kl_target:
            self.kl_coefficient = next_kl_coefficient(
                self.kl_coefficient,
                metrics["kl/reference"],
                target=algorithm.kl_target,
                horizon=algorithm.kl_horizon,
                samples=self.config.samples_per_step,
            )
        return metrics


def mean_metrics(updates: list[dict[str, float]]) -> dict[str, float]:
    """The mean over the updates of a step, by name."""
    return {name: float(np.mean([update[name] for update in updates])) for name in updates[0]}


def token_weighted(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of the ranks' means, weighted by their `tokens`; a name that ends in _max is a maximum."""
    weights = [part["tokens"] for part in parts]
    names = [name for name in parts[0] if name != "tokens"]
    return {
        name: max(part[name] for part in parts)
        if name.endswith("_max")
        else float(np.average([part[name] for part in parts], weights=weights))
        for name in names
    }


def trained_tokens(batch: Batch, rows: list[list[int]]) -> float:
    """Tokens of the rows of all updates, prompts and responses together."""
    tokens = np.diff(batch.columns["prompts"].offsets) + np.diff(batch.columns["responses"].offsets)
    return float(sum(tokens[update].sum() for update in rows))
