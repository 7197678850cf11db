"""How often answers to held-out prompts are right, from several answers to each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that at least one of `k` answers is correct, from `correct` out of `samples` drawn ones.

    The unbiased estimator 1 - C(samples - correct, k) / C(samples, k) of Chen et al. 2021 (arXiv 2107.03374), eq. 1, as
    a product that can't overflow.
    Raises: ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"no pass@{k} out of {samples} samples with {correct} correct ones")
    if samples - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - correct + 1, samples + 1)))


def majority_row(groups: Sequence[int | None]) -> int | None:
    """The first row of the largest group of equal answers; of groups of one size, the one that begins first.

    Args: groups: for each answer of a prompt a number that equal answers share; None for one that has no vote.
    Returns: None when nobody votes.
    """
    votes: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        if group is not None:
            votes.setdefault(group, []).append(row)
    return max(votes.values(), key=lambda rows: (len(rows), -rows[0]))[0] if votes else None


def accuracy_metrics(correct: np.ndarray, groups: Sequence[Sequence[int | None]]) -> dict[str, float]:
    """Means over P prompts with n answers each.

    Args: correct: [P, n] bool. groups: P lists of n as `majority_row` takes them.
    Returns: with one answer `pass@1`. With more `avg@n` (share of correct answers), `maj@n` (share of prompts whose
        majority is right; nobody voting is wrong) and `pass@k` (`pass_at_k`) for k = 1, 2, 4, ... and n.
    """
    prompts, samples = correct.shape
    if samples == 1:
        return {"pass@1": float(correct.mean())}
    chosen = [majority_row(own) for own in groups]
    right = [row is not None and bool(correct[prompt, row]) for prompt, row in enumerate(chosen)]
    metrics = {f"avg@{samples}": float(correct.mean()), f"maj@{samples}": sum(right) / prompts}
    counts = correct.sum(axis=1)
    for k in sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples}):
        metrics[f"pass@{k}"] = float(np.mean([pass_at_k(samples, int(count), k) for count in counts]))
    return metrics
