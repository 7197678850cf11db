"""How far the two engines of the workers are apart on a step's samples, and what corrections make of that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qerl_rl.algorithms.correction import importance_ratios, weight_metrics
from qerl_rl.algorithms.mismatch import REJECTED_SAMPLES, partial_mismatch
from qerl_rl.algorithms.rejection import kept_tokens, sequences_with_rejected_tokens
from qerl_rl.algorithms.sequences import sequence_ids
from qerl_rl.config.schema import RolloutCorrectionConfig


def comparison(
    rollout: Sequence[np.ndarray], old: Sequence[np.ndarray], correction: RolloutCorrectionConfig
) -> dict[str, float]:
    """What this rank has to tell of its samples; `finish_mismatch` makes metrics of the average over ranks.

    Args: log-probs of the rollout engine and of the trainer before its update, one array [tokens] a sample.
    """
    metrics = partial_mismatch(rollout, old)
    if not correction.compares:
        return metrics
    ids = sequence_ids(torch.tensor([len(row) for row in old]))
    trained, sampled = (torch.from_numpy(np.concatenate(rows)) for rows in (old, rollout))
    if correction.rollout_is != "none":
        ratios = importance_ratios(trained, sampled, ids, level=correction.rollout_is)
        metrics |= weight_metrics(ratios, *correction.is_band)
    if correction.rejects:
        rejected = sequences_with_rejected_tokens(kept_tokens(trained, sampled, ids, correction), ids)
        metrics[REJECTED_SAMPLES] = rejected / len(ids)
    return metrics
