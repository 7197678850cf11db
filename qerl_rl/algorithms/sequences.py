"""Arithmetic over sequences that lie one after another in a flat tensor, without padding."""

from __future__ import annotations

import torch
from torch import Tensor

TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM_CONSTANT = "token_mean", "sequence_mean", "sequence_sum_constant"
AGGREGATIONS = (TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM_CONSTANT)
PAIR_MEAN = "pair_mean"
"""For losses over pairs of sequences that lie one after another; no launch file names it, dpo implies it."""


def sequence_ids(lengths: Tensor) -> Tensor:
    """Which sequence each token belongs to: int64 [T] out of the lengths, int [S], T their sum."""
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def sequence_count(ids: Tensor) -> int:
    """Sequences that ids int [T], counted from 0, name."""
    return int(ids.max()) + 1 if len(ids) else 0


def sequence_sums(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sum of values [T] over each of `count` sequences, ids int [T]: [count], 0 where a sequence has no token."""
    return values.new_zeros(count).index_add(0, ids, values)


def sequence_means(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """Mean of values [T] over each of `count` sequences, ids int [T]: [count], 0 where a sequence has no token."""
    tokens = torch.bincount(ids, minlength=count).clamp(min=1)
    return sequence_sums(values, ids, count) / tokens


def discounted_to_go(values: Tensor, lengths: Tensor, discount: float) -> Tensor:
    """G_t = v_t + discount * G_(t+1) inside each sequence: [T] from values [T] and lengths int [S].

    All sequences advance together, so the loop is over positions and not over tokens.
    """
    totals = values.clone()
    ends = lengths.cumsum(0)
    for back in range(2, int(lengths.max()) + 1 if len(lengths) else 0):
        # `back` tokens before its sequence's end, whose successor is final already.
        here = ends[lengths >= back] - back
        totals[here] += discount * totals[here + 1]
    return totals


def token_weights(lengths: Tensor, aggregation: str, constant: int) -> tuple[Tensor, int]:
    """How much each token's loss counts, and what the weighted sum over all micro-batches is divided by.

    token_mean: weight 1, divided by the number of tokens (DAPO, arXiv 2503.14476, eq. 12). sequence_mean: 1 / length,
    divided by the number of sequences (GRPO, arXiv 2402.03300, eq. 3). sequence_sum_constant: 1 / constant, divided by
    the number of sequences (Dr. GRPO, arXiv 2503.20783, section 3.2: no sequence counts less for being long).
    pair_mean: weight 1, divided by the number of pairs (DPO, arXiv 2305.18290, eq. 7: the mean over pairs).

    Both parts of the result add up over micro-batches and ranks, hence any split gives the same loss and gradients.

    Args: lengths int [S], tokens of each sequence. constant: tokens, used by sequence_sum_constant only.
    Returns: (weights float32 [T], the normalizer of these sequences).
    Raises: ValueError for another aggregation.
    """
    if aggregation == TOKEN_MEAN:
        tokens = int(lengths.sum())
        return torch.ones(tokens, device=lengths.device), tokens
    if aggregation == SEQUENCE_MEAN:
        return (1.0 / lengths).repeat_interleave(lengths), len(lengths)
    if aggregation == SEQUENCE_SUM_CONSTANT:
        return torch.full((int(lengths.sum()),), 1.0 / constant, device=lengths.device), len(lengths)
    if aggregation == PAIR_MEAN:
        return torch.ones(int(lengths.sum()), device=lengths.device), len(lengths) // 2
    raise ValueError(f"aggregation {aggregation!r} is neither {' nor '.join(AGGREGATIONS)}")
