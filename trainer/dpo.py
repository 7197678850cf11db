"""DPO (arXiv 2305.18290): learns from pairs of a chosen and a rejected response, without a rollout."""

from __future__ import annotations

from typing import cast

import numpy as np

from qerl_rl.data.pairs import Pair
from trainer.base import Trainer
from trainer.columns import DPO
from trainer.shares import mini_batch_rows, update_shares
from trainer.stages import mean_metrics, trained_tokens
from transfer_dock import Jagged, SampleKey


class DpoTrainer(Trainer):
    """Makes the chosen responses likelier than the rejected ones, measured against the model it began with.

    dpo.loss makes the same loop IPO or conservative DPO. The rollout engines only answer evaluations.
    """

    stages = DPO

    def step(self, step: int) -> dict[str, float]:
        evaluation = self.answer(step)
        self.put_pairs(step)
        self.reference_log_probs(step)
        update = self.update(step)
        self.dock.close_step(step, carry_unfinished=False)
        return {**evaluation, **update}

    def answer(self, step: int) -> dict[str, float]:
        """Where an evaluation is due, the engines get the cards for it."""
        if not self.evaluates_at(step):
            return {}
        self.swap("swap_to_rollout", step)
        metrics = self.evaluate(step)
        self.swap("swap_to_train")
        return metrics

    def put_pairs(self, step: int) -> None:
        """Two rows a pair: the chosen response and the rejected one, each behind their prompt."""
        pairs = cast("list[Pair]", self.plan.prompts.next(self.config.algorithm.prompts_per_step))
        keys = [SampleKey(step, group, index) for group in range(len(pairs)) for index in range(2)]
        columns = {
            "prompts": Jagged.from_rows([pair.tokens for pair in pairs for _ in range(2)]),
            "responses": Jagged.from_rows([tokens for pair in pairs for tokens in (pair.chosen, pair.rejected)]),
        }
        self.dock.put(columns, keys)
        self.recorder.pairs(step, pairs)

    def reference_log_probs(self, step: int) -> None:
        """Of all responses of the step, by the model that training began with."""
        with self.recorder.phase("log_probs"):
            self.run_stage("reference_log_probs", step)

    def update(self, step: int) -> dict[str, float]:
        """One optimizer update a mini-batch of whole pairs, algorithm.epochs_per_step times over all of them."""
        algorithm = self.config.algorithm
        with self.recorder.phase("update"):
            batch = self.lease("update", step)
            random = np.random.default_rng([self.config.run.seed, step])
            rows = mini_batch_rows(batch.keys, algorithm.prompts_per_mini_batch, algorithm.epochs_per_step, random)
            shares = update_shares(batch, rows, self.config.train_data_parallel, whole_groups=True)
            results = self.on_train_ranks("update_pairs", shares, lambda share: (share, step))
            self.dock.ack(batch)
        return {**mean_metrics(results[0]), "train/tokens": trained_tokens(batch, rows)}
