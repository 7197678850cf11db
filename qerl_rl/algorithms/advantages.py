"""How much better a sample, or a token of it, is than what was to be expected."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qerl_rl.algorithms.sequences import discounted_to_go, sequence_ids, sequence_sums


@dataclass(frozen=True)
class Outcome:
    """What a step's samples earned.

    rewards: [S] float, of whole samples. group_ids: [S] int, equal for samples of one prompt. lengths: [S] int64,
    response tokens of each sample. token_rewards: [T] float, what single tokens earned beside that (a KL penalty; zeros
    without one), sample after sample; T is the sum of the lengths.
    """

    rewards: Tensor
    group_ids: Tensor
    lengths: Tensor
    token_rewards: Tensor

    def by_token(self) -> Tensor:
        """[T] float64: what each token earned, its sample's reward coming with the last one."""
        return rewards_by_token(self.rewards, self.lengths, self.token_rewards)

    def totals(self) -> Tensor:
        """[S] float64: the reward of each sample with those of its tokens."""
        ids = sequence_ids(self.lengths)
        return self.rewards.double() + sequence_sums(self.token_rewards.double(), ids, len(self.rewards))


def group_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool, eps: float = 1e-6) -> Tensor:
    """Advantage of each sample against its group: A_i = (r_i - mean(r)) / (std(r) + eps).

    The outcome-supervised advantage of GRPO (DeepSeekMath, arXiv 2402.03300, section 4.1.2); without `normalize_std`
    only the mean is subtracted (Dr. GRPO, arXiv 2503.20783, section 3.2). std is the sample standard deviation (n - 1).

    Args: rewards [S] float; group_ids [S] int, equal for samples of one prompt, in any order.
    Returns: [S] float32 on the device of `rewards`; exactly zero for a group whose rewards are all equal.
    Raises: ValueError when shapes differ, a reward is not finite, or a group has one sample only.
    """
    centred, members, counts = _centred(rewards, group_ids)
    if normalize_std:
        variances = centred.new_zeros(len(counts)).scatter_add(0, members, centred**2) / (counts - 1)
        centred = centred / (variances.sqrt()[members] + eps)
    return centred.float()


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO: A_i = r_i - mean of the other samples' rewards = n / (n - 1) * (r_i - mean(r)), n samples in the group.

    The baseline does not depend on the sample itself, so the gradient stays unbiased (Ahmadian et al., arXiv
    2402.14740, section 3.3; Kool, van Hoof and Welling 2019).

    Args, Returns, Raises: as `group_advantages`.
    """
    centred, members, counts = _centred(rewards, group_ids)
    return (centred * (counts / (counts - 1))[members]).float()


def reinforce_plus_plus_advantages(
    rewards: Tensor, lengths: Tensor, token_rewards: Tensor, *, discount: float, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++: discounted reward to go of each token, normalized over all tokens of the batch.

    G_t = sum over s >= t of discount^(s-t) * (token_reward_s + [s is the last token] * reward);
    A_t = (G_t - mean(G)) / (std(G) + eps), mean and std (population) over the tokens of the whole batch (Hu et al.,
    arXiv 2501.03262, "global advantage normalization"). With token_reward = -beta * KL this is the paper's
    A_t = r - beta * sum of the KL from t on.

    Args: rewards [S]; lengths int64 [S]; token_rewards [T]. Returns: [T] float32, zeros when all G are equal.
    Raises: ValueError when shapes don't fit or a value is not finite.
    """
    _check_outcome(rewards, lengths, token_rewards)
    return normalized(discounted_to_go(rewards_by_token(rewards, lengths, token_rewards), lengths, discount), eps)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, group_ids: Tensor, lengths: Tensor, *, eps: float = 1e-8
) -> Tensor:
    """REINFORCE++ with baseline: the reward less its group's mean, then normalized over all tokens of the batch.

    A = (c - mean(c)) / (std(c) + eps), c = r_i - mean of its group on each token of sample i (arXiv 2501.03262,
    "REINFORCE++ w/ Baseline"). Unlike GRPO, an easy prompt's small differences are not blown up to the size of others.

    Args: rewards [S]; group_ids int [S]; lengths int64 [S]. Returns: [T] float32, zeros when all c are equal.
    Raises: ValueError as `group_advantages`.
    """
    centred, _, _ = _centred(rewards, group_ids)
    return normalized(centred.repeat_interleave(lengths), eps)


def generalized_advantages(
    rewards: Tensor, values: Tensor, lengths: Tensor, *, discount: float, decay: float
) -> tuple[Tensor, Tensor]:
    """GAE: A_t = sum over s >= t of (discount * decay)^(s-t) * delta_s, delta_t = r_t + discount * V_(t+1) - V_t.

    Schulman et al., arXiv 1506.02438, eq. 16; V after a sequence's last token is 0: responses end.

    Args: rewards [T] by token; values [T], the critic's before the token; lengths int64 [S].
    Returns: (advantages [T], returns [T] = advantages + values), in the dtype of `values`.
    Raises: ValueError when shapes don't fit.
    """
    if rewards.shape != values.shape or rewards.ndim != 1 or int(lengths.sum()) != len(values):
        raise ValueError(
            f"rewards {list(rewards.shape)} and values {list(values.shape)} must both be [{int(lengths.sum())}]"
        )
    following = torch.zeros_like(values)
    following[:-1] = values[1:]
    following[lengths.cumsum(0)[lengths > 0] - 1] = 0.0
    deltas = rewards + discount * following - values
    advantages = discounted_to_go(deltas, lengths, discount * decay)
    return advantages, advantages + values


def _centred(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards less their group's mean, float64 [S]; number of each sample's group [S]; samples of each group [G])."""
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
    return centred, members, counts


def _check_outcome(rewards: Tensor, lengths: Tensor, token_rewards: Tensor) -> None:
    if rewards.ndim != 1 or rewards.shape != lengths.shape or token_rewards.shape != (int(lengths.sum()),):
        shapes = f"rewards {list(rewards.shape)}, lengths {list(lengths.shape)}"
        raise ValueError(f"{shapes} and token_rewards {list(token_rewards.shape)} don't fit: [S], [S], [T]")
    for name, values in (("rewards", rewards), ("token_rewards", token_rewards)):
        if not torch.isfinite(values).all():
            raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {len(values)} {name} are not finite")


def rewards_by_token(rewards: Tensor, lengths: Tensor, token_rewards: Tensor) -> Tensor:
    """token_rewards [T] plus the reward of each sample [S] on its last token: [T] float64; lengths int64 [S]."""
    earned = token_rewards.double().clone()
    filled = lengths > 0
    earned[lengths.cumsum(0)[filled] - 1] += rewards.double()[filled]
    return earned


def normalized(values: Tensor, eps: float = 1e-8) -> Tensor:
    """(values - mean) / (std + eps) of float64 [T] as float32; exactly zero where nothing differs."""
    if not len(values) or values.min() == values.max():
        return torch.zeros(len(values), device=values.device)
    return ((values - values.mean()) / (values.std(correction=0) + eps)).float()
