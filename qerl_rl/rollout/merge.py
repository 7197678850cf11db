"""Adapters merged into the engine's weights at each swap, rounded again to the format that the engine computes in.

Each rank merges the rows and columns that it holds. The clean base is read again from the checkpoint each time, those
rows and columns only (its pages stay in the system's cache), so nothing adds up over swaps and no second copy is kept.
One module at a time is packed anew.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.quant.requantize import Shard, Survival, joined_rows, merged_bfloat16, merged_parts, scale_growth
from qerl_rl.quant.rounding import Rounding
from qerl_rl.rollout.adapters import check_complete
from qerl_rl.rollout.expert_path import ADAPTED_KERNELS, expert_kernel
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.merge_shards import ShardFinder, WeightShard
from qerl_rl.rollout.repack import packed_modules, repack


class MergedAdapters:
    """The weights of one rank's model that adapters change.

    Args: model: as vLLM built it. plan: how it was loaded. finder: of what this rank holds. shapes: by name, what it
    holds of each adapter's tensor.
    """

    nbytes = 0
    """Bytes that adapters take beside the weights."""

    def __init__(
        self,
        model: torch.nn.Module,
        vllm_config: Any,
        plan: LoadPlan,
        lora: LoraConfig,
        seed: int,
        finder: ShardFinder,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        self._config, self._lora, self._seed, self._plan = vllm_config, lora, seed, plan
        self.locals = shapes
        modules = packed_modules(model)
        self._parameters: dict[Any, dict[str, list[WeightShard]]] = {}
        for parameter, shards in finder.parameters(lora).items():
            path, _, kind = parameter.rpartition(".")
            if path not in modules:
                raise RuntimeError(f"the engine's model has no {path}: its module names are not those expected")
            self._parameters.setdefault(modules[path], {})[kind] = shards
        self._staged: dict[str, torch.Tensor] = {}
        self._missing: set[str] = set()
        self._step = 0
        self.survival = Survival()
        """Of the last update: this rank's share of the sums over all ranks."""

    def begin(self, step: int) -> None:
        """An update begins, which will be rounded with the numbers of `step`."""
        self._step, self._missing, self._staged = step, set(self.locals), {}

    def write(self, local: str) -> torch.Tensor:
        """The tensor to fill, float32. Raises: KeyError when the engine holds none of this name."""
        if local not in self._staged:
            self._staged[local] = torch.empty(self.locals[local], dtype=torch.float32)
        return self._staged[local]

    def complete(self, local: str) -> None:
        """All of it has been written."""
        self._missing.discard(local)

    @torch.no_grad()
    def finish(self) -> int:
        """Put base + adapters into the engine; returns the bytes written. Collective over tensor-parallel ranks.

        Raises: RuntimeError when tensors are missing; the weights stay as they are then.
        """
        check_complete(self._missing)
        rounding = Rounding(self._lora.merge_rounding == "stochastic", self._seed, self._step)
        self.survival = Survival()
        growth = self._common_growth(rounding)
        for module, parameters in self._parameters.items():
            merged: dict[str, torch.Tensor] = {}
            for kind, shards in parameters.items():
                tensors = [self._merged(shard, rounding, growth.get(shard.weight)) for shard in shards]
                merged |= {kind + suffix: _fused(tensors, suffix, shards) for suffix in tensors[0]}
            repack(module, self._config, merged)
        self._staged = {}
        return sum(tensor.nbytes for module in self._parameters for tensor in module.parameters())

    def _merged(self, shard: WeightShard, rounding: Rounding, growth: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """By suffix, the parts of a shard with its adapter; of bfloat16 there is one."""
        a, b = self._factors(shard)
        format, survival = self._plan.engine_format(shard.weight), Survival()
        place = Shard(shard.weight, shard.rows.start, shard.columns.start, shard.width)
        if format is None:
            # As it was loaded: on the grid already.
            base = self._plan.floats(shard.weight, shard.rows, shard.columns)
            merged = {"": merged_bfloat16(base, a, b, rounding, place, survival)}
        else:
            parts = self._plan.parts(shard.weight, shard.rows, shard.columns)
            merged = merged_parts(format, parts, a, b, rounding, place, survival, growth)
        self.survival.add(survival, shard.share)
        return merged

    def _factors(self, shard: WeightShard) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, columns] and B [rows, rank] times the scale."""
        a, b = (self._staged[f"{shard.adapter}.lora_{matrix}"] for matrix in "AB")
        if shard.expert is not None:
            a, b = a[shard.expert], b[shard.expert]
        return a, b[shard.first : shard.first + shard.shape[0]] * (self._lora.alpha / self._lora.rank)

    def _common_growth(self, rounding: Rounding) -> dict[str, torch.Tensor]:
        """By weight, how far scales that stand for columns of other ranks too must grow: the most that any needs."""
        growth: dict[str, torch.Tensor] = {}
        for parameters in self._parameters.values():
            for shard in (shard for shards in parameters.values() for shard in shards if shard.is_split):
                format = self._plan.engine_format(shard.weight)
                if format is not None and not format.group_size:
                    parts = self._plan.parts(shard.weight, shard.rows, shard.columns)
                    growth[shard.weight] = scale_growth(format, parts, *self._factors(shard), rounding.stochastic)
        if growth:
            from vllm.distributed import get_tp_group

            flat = torch.cat([needed.flatten() for needed in growth.values()])
            dist.all_reduce(flat, dist.ReduceOp.MAX, group=get_tp_group().cpu_group)
            sizes = [needed.numel() for needed in growth.values()]
            pieces = zip(growth.items(), flat.split(sizes), strict=True)
            growth = {weight: piece.view_as(needed) for (weight, needed), piece in pieces}
        return growth


def _fused(tensors: list[dict[str, torch.Tensor]], suffix: str, shards: list[WeightShard]) -> torch.Tensor:
    """One part of a module's shards under each other; of experts, stacked."""
    rows, last = joined_rows([tensor[suffix] for tensor in tensors]), shards[-1].expert
    return rows if last is None else rows.unflatten(0, (last + 1, -1))


def has_adapters(lora: LoraConfig) -> bool:
    """Whether anything is adapted: nothing is with a rank of 0, where all weights train."""
    return lora.rank > 0 and (lora.attention or lora.experts or lora.shared_experts)


def merges_adapters(model: torch.nn.Module, lora: LoraConfig) -> bool:
    """Whether lora.in_rollout means merging in this engine's model: `auto` does where no kernel takes an adapter.

    Raises: ConfigError for `adapter` where an expert kernel takes none.
    """
    if not has_adapters(lora):
        return False
    layers = [layer for path, layer in packed_modules(model).items() if path.endswith(".experts")]
    refusing = {expert_kernel(layer) for layer in layers} - ADAPTED_KERNELS if lora.experts else set()
    if lora.in_rollout == "adapter" and refusing:
        raise ConfigError(
            f"lora.in_rollout=adapter, but this engine's expert kernel {min(refusing)} takes no adapter.",
            fix="set lora.in_rollout to auto or merge, or lora.experts to false",
        )
    return lora.in_rollout == "merge" or bool(lora.in_rollout == "auto" and refusing)
