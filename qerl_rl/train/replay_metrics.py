"""How much of a pass followed the rollout engine's routing, and how much of that the routers would have done anyway."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qerl_rl.train.exchange import sum_over_ranks
from qerl_rl.train.packing import Pack


def replay_metrics(packs: Sequence[Pack], *, is_output_rank: bool, device: torch.device) -> dict[str, float]:
    """Shares over the packs of all ranks of the world, equal everywhere; collective, after a pass over the packs.

    Returns: `router_replay/missing`, of the response tokens those whose log-prob comes from a token that no expert was
    recorded for, and `router_replay/changed`, of the routed (token, layer) pairs those that the router by itself would
    have sent to other experts.
    """
    forced = [pack.forced for pack in packs if pack.forced is not None]
    counts = [count.tolist() for own in forced for count in own.changed.values()]
    sums = {"changed": sum(changed for changed, _ in counts), "routed": sum(routed for _, routed in counts)}
    if is_output_rank:
        sums |= {"missing": sum(map(_missing, packs)), "tokens": sum(len(pack.positions) for pack in packs)}
    totals = sum_over_ranks(sums, device)
    return {
        "router_replay/missing": totals["missing"] / max(totals["tokens"], 1),
        "router_replay/changed": totals["changed"] / max(totals["routed"], 1),
    }


def _missing(pack: Pack) -> int:
    if pack.forced is None:
        return len(pack.positions)
    return int((~pack.forced.known[pack.positions]).sum())
