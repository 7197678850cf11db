"""What of the policy moves in a swap, and by which plan: adapters over a frozen base, or all weights."""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch.distributed as dist

from qerl_rl.config.schema import Config
from qerl_rl.platform import detect
from qerl_rl.reshard.checksum import Checksum
from qerl_rl.reshard.exchange import Exchange
from qerl_rl.reshard.ledger import Traffic
from qerl_rl.reshard.moved import plan_of
from qerl_rl.reshard.node_exchange import make_exchange
from qerl_rl.reshard.plan import Plan, RankPlan
from qerl_rl.reshard.transfer import TransferReport, transfer
from qerl_rl.rollout.engine import RolloutEngine
from qerl_rl.train.engine import TrainEngine

if TYPE_CHECKING:
    from qerl_rl.train.shard_source import OnFinished

DEADLINE = 0.9
"""Part of fault.train_timeout_s that a bucket may take: an error of the ranks names the peer, the driver's can't."""


@dataclass(frozen=True)
class Moved:
    """What one rank's part of a transfer did: bytes written into its engine, bytes whose sums were compared."""

    written_bytes: int
    traffic: Traffic
    checksum_bytes: int


class PolicyTransfer:
    """Brings the policy from the trainer into the engine of each rank; plan and staging are made once and kept."""

    def __init__(self, train: TrainEngine, rollout: RolloutEngine, config: Config) -> None:
        self._train, self._rollout, self._config = train, rollout, config

    @cached_property
    def plan(self) -> Plan:
        """From the trainer's layout to the engines'. Raises: ConfigError where one can't hold this model."""
        return plan_of(self._config, self._train.architecture, ranks_per_node())

    def move(self, step: int, *, check: bool, on_finished: OnFinished | None = None) -> Moved:
        """Fill the engine with the policy as it is; collective. `check` compares sums of both sides.

        Args: on_finished: called with (name, parameter) when a parameter of this rank has been read for the last time.
        Raises: TransferError, ChecksumError.
        """
        plan = self._rank_plan
        if self._train.has_adapters:
            source, target = self._train.adapter_source(on_finished), self._rollout.adapter_target(step)
        else:
            source, target = self._train.weight_source(on_finished), self._rollout.weight_target()
        sums = self._checksum.begin(source, target) if check else None
        report = transfer(plan, sums.source if sums else source, sums.target if sums else target, self._exchange)
        if sums:
            sums.compare(step)
        traffic = self._traffic(report)
        if sums:
            traffic.seconds["checksum"] = sums.seconds
        return Moved(target.finish(), traffic, sums.summed_bytes if sums else 0)

    def _traffic(self, report: TransferReport) -> Traffic:
        near, far = self._received
        return Traffic(
            copied_bytes=report.copied_bytes,
            sent_bytes=report.sent_bytes,
            same_node_bytes=near,
            across_nodes_bytes=far,
            staging_bytes=report.staging_bytes,
            over_lower_bound=self._over_lower_bound,
            seconds=dict(report.seconds),
        )

    # ---- made at the first swap

    @cached_property
    def _rank_plan(self) -> RankPlan:
        return self.plan.for_rank(dist.get_rank())

    @cached_property
    def _exchange(self) -> Exchange:
        config = self._config
        return make_exchange(detect(config.train.device), DEADLINE * config.fault.train_timeout_s)

    @cached_property
    def _checksum(self) -> Checksum:
        plan = self.plan
        return Checksum(plan.tensors, plan.source, plan.target, dist.get_rank(), self._train.device)

    @cached_property
    def _over_lower_bound(self) -> float:
        return self.plan.summary().moved_over_lower_bound

    @cached_property
    def _received(self) -> tuple[int, int]:
        """Bytes that this rank receives from its own node, and from others."""
        here, found = dist.get_rank() // self.plan.ranks_per_node, [0, 0]
        for bucket in self._rank_plan.buckets:
            for peer, holdings in bucket.receives.items():
                size = sum(h.box.elements * self._rank_plan.dtypes[h.tensor].itemsize for h in holdings)
                found[peer // self.plan.ranks_per_node != here] += size
        return found[0], found[1]


def ranks_per_node() -> int:
    """Ranks that share a machine, where they are numbered machine by machine, equally many on each; 1 elsewhere."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    runs = [len(list(run)) for _, run in groupby(names)]
    return runs[0] if len(set(runs)) == 1 and len(runs) == len(Counter(names)) else 1
