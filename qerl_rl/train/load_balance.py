"""The loss that balances experts, of the micro-batches of an update: what each counts, and what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from qerl_rl.algorithms.sequences import token_weights
from qerl_rl.train.exchange import sum_over_ranks
from qerl_rl.train.packing import Pack

if TYPE_CHECKING:
    from qerl_rl.model.load_balance import LoadBalance


def load_balances(
    packs: Sequence[Pack], coefficient: float, aggregation: str, constant: int
) -> list[LoadBalance] | None:
    """One for each pack, which counts like in the policy's loss; None without a coefficient."""
    if not coefficient:
        return None
    from qerl_rl.model.load_balance import LoadBalance

    counts = [token_weights(pack.response_lengths, aggregation, constant)[1] for pack in packs]
    tokens = [int(pack.cumulative_lengths[len(pack.indices)]) for pack in packs]
    return [LoadBalance(coefficient, count, own) for count, own in zip(counts, tokens, strict=True)]


def balance_metrics(balances: Sequence[LoadBalance] | None, device: torch.device) -> dict[str, float]:
    """After the update's passes, equal on every rank; collective. Empty where nothing is balanced.

    Returns: `router_aux_loss`, the mean over layers and micro-batches (weighted like the policy's loss), without the
    coefficient: 1 where all experts are equally busy, up to experts / top_k where the same ones get all tokens.
    """
    if balances is None:
        return {}
    from megatron.core import parallel_state

    sums = {"loss": sum(float(loss) * own.weight for own in balances for loss in own.losses.values())}
    # Tensor-parallel ranks have a part of each loss.
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        sums["weight"] = float(sum(own.weight * len(own.losses) for own in balances))
    totals = sum_over_ranks(sums, device)
    return {"router_aux_loss": totals["loss"] / totals["weight"]}
