"""Log-probs of given tokens and entropies, from logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _VocabParallelScores(torch.autograd.Function):
    """(log p[target], H) of softmax(logits); gradients from log p alone, one [N, V/TP] tensor is kept for backward.

    d log p_t / d x_j = [j = t] - p_j        d H / d x_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, first: int, group: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count, width = logits.shape
        maximum = logits.amax(dim=-1, keepdim=True) if width else logits.new_full((count, 1), -torch.inf)
        _reduce(maximum, group, dist.ReduceOp.MAX)
        log_probs = logits - maximum
        probs = log_probs.exp()
        total = probs.sum(dim=-1, keepdim=True)
        _reduce(total, group)
        log_probs -= total.log()
        local = targets - first
        mine = ((local >= 0) & (local < width)).nonzero().squeeze(-1)
        sums = logits.new_zeros(2, count)
        sums[0, mine] = log_probs[mine, local[mine]]
        # xlogy's convention: what has no probability adds no entropy, even where its log-prob is -inf.
        sums[1] = probs.div_(total).mul_(log_probs).nan_to_num_(nan=0.0).sum(dim=-1).neg_()
        _reduce(sums, group)
        ctx.save_for_backward(log_probs, sums[1], mine, local[mine])
        ctx.set_materialize_grads(False)
        return sums[0].clone(), sums[1].clone()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_log_probs: torch.Tensor | None, grad_entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None, None]:
        log_probs, entropy, mine, local = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None
        gradient = log_probs.exp().neg_()
        if grad_entropy is None:
            gradient *= grad_log_probs[:, None]  # type: ignore[index]
        else:
            factor = torch.nan_to_num(log_probs + entropy[:, None], neginf=0.0) * grad_entropy[:, None]
            if grad_log_probs is not None:
                factor += grad_log_probs[:, None]
            gradient *= factor
        if grad_log_probs is not None:
            gradient[mine, local] += grad_log_probs[mine]
        return gradient, None, None, None


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None, operation: Any = dist.ReduceOp.SUM) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=operation, group=group)


def vocab_parallel_scores(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    vocabulary: int,
    first: int = 0,
    group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of each distribution softmax(logits / temperature), in nats.

    The vocabulary is never gathered: three all-reduces of [N] numbers go over `group`.

    Args:
        logits: [N, V_local], the vocabulary entries first .. first + V_local - 1 of this rank, any float type.
        targets: int64 [N], token ids below `vocabulary`.
        vocabulary: real entries; what lies beyond pads the embedding and has no probability.
        group: the tensor-parallel ranks; None where one rank holds the whole vocabulary.
    Returns: (log_probs [N], entropy [N]), float32, the same on all ranks of the group; both carry gradients.
    """
    real = min(max(vocabulary - first, 0), logits.shape[-1])
    scaled = logits[:, :real].float() / temperature
    return _VocabParallelScores.apply(scaled, targets, first, group)
