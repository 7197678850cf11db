"""What a step's samples earned: the reward function's numbers, and what the driver adds for length and KL."""

from __future__ import annotations

import numpy as np
import torch

from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.algorithms.dapo import groups_with_signal, overlong_penalties
from qerl_rl.algorithms.kl import kl_penalties
from qerl_rl.config.schema import Config
from transfer_dock import Batch


def step_outcome(config: Config, batch: Batch, kl_coefficient: float) -> tuple[Outcome, dict[str, float]]:
    """The outcome of all samples of a step, and its metrics.

    `reward/mean` and its like are of the reward function alone; `reward/overlong_mean` and `reward/kl_mean` are what
    was added to a sample on average, where algorithm.overlong_buffer_tokens and kl_in ask for it. `reward/model_mean`
    is the reward model's mean score before reward_model.weight, where the workers hold one.

    Args: batch: rows with rewards, responses, truncated, old_log_probs and reference_log_probs (and model_scores).
        kl_coefficient: what the KL of a token costs, where algorithm.kl_in is reward.
    """
    columns, algorithm = batch.columns, config.algorithm
    rewards = torch.from_numpy(np.array(columns["rewards"]))
    groups = torch.tensor([key.group for key in batch.keys])
    lengths = torch.from_numpy(np.diff(columns["responses"].offsets).astype(np.int64))
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "reward/groups_without_signal": float((~groups_with_signal(rewards, groups)).float().mean()),
        "response/length_mean": float(lengths.float().mean()),
        "response/truncated": float(np.asarray(columns["truncated"]).mean()),
    }
    if config.reward_model.on_the_cards:
        scores = torch.from_numpy(np.array(columns["model_scores"]))
        rewards = rewards + config.reward_model.weight * scores
        metrics["reward/model_mean"] = float(scores.mean())
    if algorithm.overlong_buffer_tokens:
        longest = config.rollout.max_response_tokens
        penalties = overlong_penalties(lengths, longest=longest, buffer=algorithm.overlong_buffer_tokens)
        rewards = rewards + algorithm.overlong_penalty * penalties
        metrics["reward/overlong_mean"] = float(algorithm.overlong_penalty * penalties.mean())
    token_rewards = torch.zeros(int(lengths.sum()))
    if algorithm.kl_in == "reward" and kl_coefficient:
        policy, reference = (flat_column(batch, name) for name in ("old_log_probs", "reference_log_probs"))
        token_rewards = kl_penalties(policy, reference, estimator=algorithm.kl_estimator, coefficient=kl_coefficient)
        metrics["reward/kl_mean"] = float(token_rewards.sum() / len(rewards))
    return Outcome(rewards, groups, lengths, token_rewards), metrics


def flat_column(batch: Batch, name: str) -> torch.Tensor:
    """A column with a value a token, sample after sample: [T]."""
    return torch.from_numpy(np.concatenate(list(batch.columns[name].rows())))
