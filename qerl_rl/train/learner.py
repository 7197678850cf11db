"""An engine whose model learns: optimizer updates, and the checkpoint they continue from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from qerl_rl.algorithms.sequences import AGGREGATIONS, PAIR_MEAN, TOKEN_MEAN
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config, TrainConfig
from qerl_rl.platform.state_store import StateStore
from qerl_rl.train import checkpoint
from qerl_rl.train.exchange import sum_over_ranks
from qerl_rl.train.load_balance import balance_metrics, load_balances
from qerl_rl.train.model_engine import ModelEngine
from qerl_rl.train.samples import Samples

if TYPE_CHECKING:
    from qerl_rl.train.passes import LossFunction

STAGES = "train.layers_per_stage"
PARALLEL_SIZES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel")


@dataclass(frozen=True)
class EngineSnapshot:
    """A copy of what updates change on this rank: `tensors` for its file, `meta` for the checkpoint's."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, int]


class LearningEngine(ModelEngine):
    """Trains the adapters (and a value head) of its model; with lora.rank 0 and no quantization, all of it."""

    prefix = ""
    """What names in a checkpoint begin with, where several engines share one."""

    def __init__(self, config: Config, store: StateStore | None, *, head: str) -> None:
        super().__init__(config, store, head=head)
        from qerl_rl.train.state import build_state

        self._state = build_state(self.model, config.train)
        self._track()
        self.updates = 0
        """Optimizer updates done."""

    def _track(self) -> None:
        # Adam's moments appear with the first update.
        self._state.track(self._offloader)

    # ---- updates

    def update(
        self, samples: Samples, loss_function: LossFunction, *, aggregation: str = "token_mean"
    ) -> dict[str, float]:
        """One optimizer update on the samples of all data-parallel ranks.

        The loss of each token counts alike (token_mean), that of each sample (sequence_mean), or a sample's is the sum
        over its tokens / config.loss_constant_tokens (sequence_sum_constant), whatever the layout and micro-batches. In
        pair_mean samples 0 and 1, 2 and 3, ... are pairs that reach the loss function together; each pair counts alike.

        Args: loss_function(*scores [T], columns {name: [T]}, token_weights [T]) -> (loss, metrics): the sum over the T
            tokens of weight * loss with its gradients, and sums over the tokens (or pairs) by name. Scores are
            log_probs and entropy of a policy, the values of a critic.
        Returns, the same on every rank: each metric divided by all response tokens (or pairs), `loss` (divided by all
            tokens, samples or pairs), `grad_norm` (before clipping) and `learning_rate`; with
            train.router_load_balancing=aux_loss what `balance_metrics` says.
        Raises: ValueError when no rank has a response token; FloatingPointError when the gradient norm is not finite.
        """
        self._require_state("update")
        if aggregation not in (*AGGREGATIONS, PAIR_MEAN):
            raise ValueError(f"aggregation {aggregation!r} is neither {' nor '.join((*AGGREGATIONS, PAIR_MEAN))}")
        packs = self._packs(samples, together=2 if aggregation == PAIR_MEAN else 1)
        learning_rate = self._learning_rate()
        self._state.set_learning_rate(learning_rate)
        self._state.zero_gradients()
        constant = self.config.loss_constant_tokens
        balances = load_balances(packs, self.config.train.router_aux_loss_coefficient, aggregation, constant)
        sums = self._passes.accumulate_gradients(
            packs, loss_function, aggregation=aggregation, constant=constant, balances=balances
        )
        balance = balance_metrics(balances, self.device)
        counts = {"#tokens": float(samples.response_tokens), "#samples": float(len(samples))}
        totals = sum_over_ranks({**sums, **counts} if self.is_output_rank else {}, self.device)
        tokens, sequences = totals.pop("#tokens"), totals.pop("#samples")
        if not tokens:
            raise ValueError("update got no response token on any rank")
        _, grad_norm, _ = self._state.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm of update {self.updates + 1} is {grad_norm}")
        self.updates += 1
        counted = sequences / 2 if aggregation == PAIR_MEAN else tokens
        metrics = {name: value / counted for name, value in totals.items() if name != "loss"}
        loss = totals["loss"] / (counted if aggregation in (TOKEN_MEAN, PAIR_MEAN) else sequences)
        metrics |= balance
        return {**metrics, "loss": loss, "grad_norm": float(grad_norm), "learning_rate": learning_rate}

    def _learning_rate(self) -> float:
        warmup = self.config.train.warmup_steps
        return self.config.train.learning_rate * min(1.0, (self.updates + 1) / max(warmup, 1))

    # ---- checkpoints

    def snapshot(self) -> EngineSnapshot:
        """A copy of the state, as a checkpoint keeps it."""
        self._require_state("snapshot")
        from qerl_rl.train import snapshot

        tensors = {f"{self.prefix}{name}": tensor for name, tensor in snapshot.take(self._state).items()}
        return EngineSnapshot(tensors, {f"{self.prefix}updates": self.updates})

    def load_checkpoint(self, folder: str | Path, step: int | None = None) -> int:
        """Continue from the checkpoint of `step` in `folder` (by default the newest complete one); returns its step.

        Written by the same layout, everything goes on bit for bit. From another layout, weights and optimizer are
        regrouped.
        Raises: ConfigError when there is none, it is broken, or its adapters are others.
        """
        self._require_state("load_checkpoint")
        meta = checkpoint.read_meta(folder, step)
        same_layout = self._check_layout(meta["layout"])
        rank = dist.get_rank()
        tensors = self._shard(folder, meta, rank) if same_layout else self._regrouped(folder, meta)
        self._restore(tensors, same_layout=same_layout)
        self.updates = meta[f"{self.prefix}updates"]
        return meta["step"]

    def _restore(self, tensors: Mapping[str, torch.Tensor], *, same_layout: bool) -> None:
        from qerl_rl.train import snapshot

        snapshot.restore(self._state, tensors)

    def _check_layout(self, written: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's layout is this one. Raises: ConfigError where nothing can be regrouped."""
        own = self._layout()
        different = {key for key in own if written.get(key, "") != own[key]}
        fixed = {key for key in different if key.startswith("lora.") or not self.has_adapters}
        if fixed:
            pairs = ", ".join(f"{key}={written.get(key)} (now {own[key]})" for key in sorted(fixed))
            raise ConfigError(f"the checkpoint was written with {pairs}.", fix="set that back, or start anew")
        return not different

    def _shard(self, folder: str | Path, meta: Mapping[str, Any], rank: int) -> dict[str, torch.Tensor]:
        """What the file of `rank` holds of this engine, without the prefix."""
        tensors = checkpoint.load_rank(folder, meta["step"], rank)
        own = [name for name in tensors if name.startswith(self.prefix)]
        return {name.removeprefix(self.prefix): tensors[name] for name in own}

    def _regrouped(self, folder: str | Path, meta: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """This rank's share of a checkpoint that another layout wrote."""
        from qerl_rl.layout.blocks import Coordinates, ParallelSizes
        from qerl_rl.layout.slots import trained_slots
        from qerl_rl.model.parallel import current_coordinates, current_sizes
        from qerl_rl.train.regroup import full_state, local_state

        written, layers = meta["layout"], self.architecture.layers
        stages = TrainConfig(layers_per_stage=written.get(STAGES, "")).stage_layers
        sizes = replace(ParallelSizes(*(written[f"train.{name}"] for name in PARALLEL_SIZES)), layers_per_stage=stages)
        slots = trained_slots(self.architecture, self.config.lora, self.model.head)
        places = [Coordinates(**place) for place in meta["places"]]
        shards = ((place, self._shard(folder, meta, place.rank)) for place in places)
        return local_state(
            slots,
            full_state(slots, shards, layers=layers, sizes=sizes),
            layers=layers,
            sizes=current_sizes(),
            here=current_coordinates(),
            shapes={name: parameter.shape for name, parameter in self._state.trainable().items()},
            runs=self._state.shard_runs(),
        )

    def _layout(self) -> dict[str, Any]:
        train, lora = self.config.train, self.config.lora
        has_shared_experts = self.architecture.shared_expert_width > 0
        return {
            "ranks": dist.get_world_size(),
            **{f"train.{name}": getattr(train, name) for name in PARALLEL_SIZES},
            STAGES: train.layers_per_stage,
            "train.dtype": train.dtype,
            "lora.rank": lora.rank,
            "lora.attention": lora.attention,
            "lora.experts": lora.experts,
            **({"lora.shared_experts": lora.shared_experts} if has_shared_experts else {}),
        }
