"""How much better a sample is than the other samples of its prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool, eps: float = 1e-6) -> Tensor:
    """Advantage of each sample against its group: A_i = (r_i - mean(r)) / (std(r) + eps).

    The outcome-supervised advantage of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2); without `normalize_std`
    only the mean is subtracted (Dr. GRPO, arXiv 2503.20783, section 3.2). std is the sample standard deviation (n - 1).

    Args: rewards [S] float; group_ids [S] int, equal for samples of one prompt, in any order.
    Returns: [S] float32 on the device of `rewards`; exactly zero for a group whose rewards are all equal.
    Raises: ValueError when shapes differ, a reward is not finite, or a group has one sample only.
    """
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(f"rewards {list(rewards.shape)} and group_ids {list(group_ids.shape)} must both be [S]")
    # Rewards such as 0.1 have no exact mean: in float32 the rest, divided by eps, would be a visible advantage.
    values = rewards.double()
    if not torch.isfinite(values).all():
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {len(values)} rewards are not finite")
    groups, members = torch.unique(group_ids, return_inverse=True)
    counts = torch.bincount(members, minlength=len(groups))
    if (counts < 2).any():
        raise ValueError(f"groups {groups[counts < 2].tolist()} have one sample only: nothing to compare it with")

    zeros = values.new_zeros(len(groups))
    means = zeros.scatter_add(0, members, values) / counts
    centred = values - means[members]
    lowest = zeros.scatter_reduce(0, members, values, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, members, values, "amax", include_self=False)
    centred = torch.where((lowest == highest)[members], torch.zeros_like(centred), centred)
    if normalize_std:
        variances = zeros.scatter_add(0, members, centred**2) / (counts - 1)
        centred = centred / (variances.sqrt()[members] + eps)
    return centred.float()
