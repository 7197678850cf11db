"""Which rows and columns of the checkpoint's weights a rank of the engine merges, and with which part of an adapter."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.holdings import Holding
from qerl_rl.layout.tensors import Weights, full_tensors
from qerl_rl.rollout.adapters import FUSED_DOWN, LAYER, adapted_linears


@dataclass(frozen=True)
class WeightShard:
    """Rows and columns of the weight [N, width] of the checkpoint, and what changes them: (rows of) B times (all of) A.

    adapter: what this rank holds of it, by the name in the exchange format. expert: which of the rank's experts, where
    A and B are stacked. first: the first of B's rows. share: one over the ranks that merge the same.
    """

    weight: str
    rows: slice
    columns: slice
    width: int
    adapter: str
    expert: int | None
    first: int
    share: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def is_split(self) -> bool:
        """Whether other ranks have other columns."""
        return self.shape[1] < self.width


class ShardFinder:
    """Finds them by the layout of the engine's weights, unquantized."""

    def __init__(self, architecture: MoeArchitecture, layout: EngineLayout, rank: int) -> None:
        self._architecture, self._layout, self._rank = architecture, layout, rank
        self._shapes = {tensor.name: tensor.shape for tensor in full_tensors(architecture, Weights())}
        self._shares: dict[Hashable, float] = {}

    def parameters(self, lora: LoraConfig) -> dict[str, list[WeightShard]]:
        """By engine parameter (...qkv_proj.weight, ...experts.w13_weight), its shards in the order of its rows."""
        found: dict[str, list[WeightShard]] = {}
        adapted = {f"{name}.weight" for name in adapted_linears(lora)}
        for holding in self._layout.holdings(self._rank):
            if ".experts." in holding.local:
                if lora.experts:
                    found.setdefault(holding.local, []).extend(self._of_experts(holding))
            elif LAYER.sub("", holding.local.removeprefix("model.")) in adapted:
                before = found.setdefault(holding.local, [])
                adapter = self._adapter(holding)
                first = sum(shard.shape[0] for shard in before if shard.adapter == adapter)
                before.append(self._of_linear(holding, adapter, first))
        return found

    @staticmethod
    def _adapter(holding: Holding) -> str:
        """The adapter of a weight, by the exchange format: that of the fused layer, or the projection's own."""
        local = holding.local.removesuffix(".weight")
        return holding.tensor.removesuffix(".weight") if local.endswith(FUSED_DOWN) else local

    def _of_linear(self, holding: Holding, adapter: str, first: int) -> WeightShard:
        *rows, width = self._shapes[holding.tensor]
        start, stop = holding.box.start, holding.box.stop
        size = rows[1] if len(rows) == 2 else 1  # Of a head, of which there are start[0] to stop[0].
        return WeightShard(
            holding.tensor,
            slice(start[0] * size, stop[0] * size),
            slice(start[-1], stop[-1]),
            width,
            adapter,
            None,
            first,
            self._share(holding),
        )

    def _of_experts(self, holding: Holding) -> Iterator[WeightShard]:
        start, stop = holding.box.start, holding.box.stop
        width = self._shapes[holding.tensor][-1]
        gate, up, down = self._architecture.expert_weight_names
        layer = holding.tensor.partition(".mlp.")[0]
        columns, share = slice(start[-1], stop[-1]), self._share(holding)
        rows = slice(start[-2], stop[-2])
        for expert in range(start[0], stop[0]):
            parent = f"{layer}.{self._architecture.mlp_name}.experts.{expert}"
            for number, name in enumerate((gate, up) if len(start) == 4 else (down,)):
                first, local = number * (rows.stop - rows.start), expert - start[0]
                yield WeightShard(f"{parent}.{name}.weight", rows, columns, width, holding.tensor, local, first, share)

    def _share(self, holding: Holding) -> float:
        """One over the ranks that hold this box."""
        key = self._layout.pattern(holding.tensor)
        if key not in self._shares:
            ranks = range(self._layout.world_size)
            boxes = [other.box for rank in ranks for other in self._layout.holdings_of(holding.tensor, rank)]
            self._shares[key] = 1.0 / boxes.count(holding.box)
        return self._shares[key]
