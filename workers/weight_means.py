"""What importance weights are divided by where rollout_correction.rollout_is_batch_normalize asks for a mean of 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from qerl_rl.algorithms.correction import importance_ratios, mean_weight, weight_sums
from qerl_rl.algorithms.sequences import sequence_ids
from qerl_rl.config.schema import RolloutCorrectionConfig
from transfer_dock import Batch

if TYPE_CHECKING:
    from qerl_rl.train.engine import TrainEngine
    from qerl_rl.train.samples import Samples


class WeightMeans:
    """The mean weight for each update of a step, equal on all ranks; None where weights are not normalized.

    It is that of the whole step, whose old log-probs stay: the mean over the samples of all mini-batches of all ranks
    (an epoch more repeats them all). In bypass_mode weights compare the policy that is updated with the engine: the
    mean is that of the mini-batch, and a pass forward before the update takes it, since one micro-batch would have
    to know of the others. Collective, both to make one and to call it.

    Args: batches: this rank's share of every mini-batch, with the columns old_log_probs and rollout_log_probs.
    """

    def __init__(self, batches: Sequence[Batch], correction: RolloutCorrectionConfig, engine: TrainEngine) -> None:
        self._correction, self._engine = correction, engine
        self._of_step: float | None = None
        if correction.rollout_is_batch_normalize and not correction.bypass_mode:
            rollout, old = (
                [row for batch in batches for row in batch.columns[name].rows()]
                for name in ("rollout_log_probs", "old_log_probs")
            )
            self._of_step = self._mean(rollout, old)

    def __call__(self, samples: Samples) -> float | None:
        """That of the update on `samples`, which have the column rollout_log_probs."""
        if not (self._correction.rollout_is_batch_normalize and self._correction.bypass_mode):
            return self._of_step
        scores = self._engine.log_probs(samples)
        return self._mean(samples.columns["rollout_log_probs"], scores.log_probs if scores else [])

    def _mean(self, rollout: Sequence[np.ndarray], learner: Sequence[np.ndarray]) -> float:
        """Over the rows of all data-parallel ranks; those of a rank that is not `is_output_rank` are another's."""
        from qerl_rl.train.exchange import sum_over_ranks

        sums: dict[str, float] = {}
        if self._engine.is_output_rank and rollout:
            ids = sequence_ids(torch.tensor([len(row) for row in rollout]))
            trained, sampled = (torch.from_numpy(np.concatenate(rows)) for rows in (learner, rollout))
            ratios = importance_ratios(trained, sampled, ids, level=self._correction.rollout_is)
            total, count = weight_sums(ratios, ids, self._correction)
            sums = {"weights": total, "count": float(count)}
        sums = sum_over_ranks(sums, self._engine.device)
        return mean_weight(sums.get("weights", 0.0), sums.get("count", 0.0))
