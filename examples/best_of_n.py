"""Best-of-n distillation: of each prompt's n answers learn the best one by heart, in the ready-made loop.

PYTHONPATH=. python launch.py --config configs/quickstart_cpu.yaml algorithm.advantage=examples.best_of_n.best_only \
    algorithm.loss=examples.best_of_n.negative_log_likelihood reward.function=examples.best_of_n.close
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.config.schema import AlgorithmConfig


def close(prompt: str, response: str, answer: str) -> float:
    """1 for the right number, less the further away it is, 0 for no number."""
    text = response.strip()
    return 1.0 / (1.0 + abs(int(text) - int(answer))) if text.isdecimal() else 0.0


def best_only(outcome: Outcome, config: AlgorithmConfig) -> Tensor:
    """1 for the first best sample of each group and 0 for the others: [S]. A group of equals teaches nothing."""
    rewards, chosen = outcome.rewards, torch.zeros(len(outcome.rewards))
    for group in outcome.group_ids.unique():
        rows = (outcome.group_ids == group).nonzero().flatten()
        if rewards[rows].min() < rewards[rows].max():
            chosen[rows[rewards[rows].argmax()]] = 1.0
    return chosen


def negative_log_likelihood(
    log_probs: Tensor, columns: Mapping[str, Tensor], token_weights: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Supervised learning of the chosen samples: l_t = -A log p, where A is 1 or 0."""
    losses = -columns["advantages"] * log_probs
    return (token_weights * losses).sum(), {"policy_loss": losses.detach().sum()}
