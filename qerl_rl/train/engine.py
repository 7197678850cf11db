"""The policy's trainer on one rank: a Megatron language model with its optimizer, over packed samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from qerl_rl.config.schema import Config
from qerl_rl.layout.slots import LANGUAGE_MODEL, adapter_slots, weight_slots
from qerl_rl.model.formats import rounded_formats
from qerl_rl.platform.state_store import StateStore
from qerl_rl.quant.noise import Noise
from qerl_rl.quant.quantize import recipe_of
from qerl_rl.train import checkpoint, export
from qerl_rl.train.background import BackgroundJob
from qerl_rl.train.first_weights import FirstWeights
from qerl_rl.train.learner import EngineSnapshot, LearningEngine
from qerl_rl.train.norm_noise import noisy_norms
from qerl_rl.train.replay_metrics import replay_metrics
from qerl_rl.train.samples import Samples

if TYPE_CHECKING:
    from qerl_rl.train.shard_source import OnFinished, ShardSource


@dataclass(frozen=True)
class TokenScores:
    """log_probs and entropy in nats: per sample float32 [response_length], in the order of the samples.

    router_replay: what `replay_metrics` says of the pass, over the samples of all ranks; empty without routing replay.
    """

    log_probs: list[np.ndarray]
    entropy: list[np.ndarray]
    router_replay: dict[str, float] = field(default_factory=dict)


class TrainEngine(LearningEngine):
    """Trains the policy: the adapters of the model at config.model.path (lora.rank 0: all of it).

    Args, Raises: as `ModelEngine`.
    """

    def __init__(self, config: Config, store: StateStore | None = None) -> None:
        super().__init__(config, store, head=LANGUAGE_MODEL)
        from qerl_rl.train.passes import Passes, token_scores

        score = token_scores(self.architecture.vocabulary_size, config.rollout.temperature)
        self._passes = Passes(self._state.ddp, score)
        if not self.has_adapters:
            self._offloader.divide(self._state.trainable().values())
        # Before any checkpoint is loaded: a resumed run has the reference it began with.
        self._first_weights: FirstWeights | None = None
        if not self.has_adapters and config.has_reference:
            self._first_weights = FirstWeights(self._state.trainable().values(), self._store)
        self._writer: BackgroundJob[None] = BackgroundJob("checkpoint")

    # ---- compute

    def log_probs(self, samples: Samples, *, reference: bool = False, noise: Noise | None = None) -> TokenScores | None:
        """Log-probs of the response tokens, and entropies, at rollout.temperature; None except on `is_output_rank`.

        With `reference` they are those of the model at config.model.path, whatever has been trained since. With `noise`
        they are those of the policy with that noise on its layer norms. Tokens go to samples.routed_experts, in all of
        them.
        Raises: ValueError for a reference where there is none (`Config.has_reference`).
        """
        self._require_parameters("log_probs")
        packs = self._packs(samples)
        with self._reference() if reference else nullcontext(), noisy_norms(self.model, noise or Noise()):
            found = self._scores(packs, len(samples))
        replay: dict[str, float] = {}
        if self.config.router_replay.is_on:
            replay = replay_metrics(packs, is_output_rank=self.is_output_rank, device=self.device)
        return None if found is None else TokenScores(found[0], found[1], replay)

    def _reference(self) -> AbstractContextManager[None]:
        """Inside, the model is what training began with: adapters are off, or the first weights are in their place."""
        if self._first_weights is not None:
            return self._first_weights.in_place()
        if not self.has_adapters:
            fix = "with lora.rank=0 the first weights are kept for a KL only (algorithm.kl_coefficient), and in dpo"
            raise ValueError(f"there is no reference: {fix}")
        from qerl_rl.model.lora import adapters_disabled

        return adapters_disabled(self.model)

    # ---- what moves to the rollout engine, and checkpoints

    def weight_source(self, on_finished: OnFinished | None = None) -> ShardSource:
        """The trained weights of this rank as the rollout engine holds them, for one transfer.

        Local names are those of the model's parameters, with the suffix of the part where config.quant rounds a weight;
        what is not rounded has the type rollout.dtype. Collective.
        Args: on_finished: called with (name, parameter) when a parameter has been read for the last time.
        Raises: ValueError where adapters train: the base never moves.
        """
        self._require_trained("weight_source")
        if self.has_adapters:
            raise ValueError("weight_source() is for lora.rank=0: over a frozen base the adapters move, not the base")
        from qerl_rl.model.build import DTYPES
        from qerl_rl.model.parallel import current_sizes
        from qerl_rl.train.shard_source import ShardSource

        return ShardSource(
            self.model,
            self.architecture,
            weight_slots(self.architecture, current_sizes()),
            formats=rounded_formats(self.architecture, recipe_of(self.config.quant)),
            dtype=DTYPES[self.config.rollout.dtype],
            on_finished=on_finished,
        )

    def adapter_source(self, on_finished: OnFinished | None = None) -> ShardSource:
        """The adapters of this rank, by the names and in the type of its parameters, for one transfer.

        Args: on_finished: as for `weight_source`.
        """
        self._require_trained("adapter_source")
        from qerl_rl.train.shard_source import ShardSource

        slots = adapter_slots(self.architecture, self.config.lora) if self.has_adapters else []
        return ShardSource(self.model, self.architecture, slots, on_finished=on_finished)

    def let_go(self, name: str, parameter: torch.Tensor) -> None:
        """The `on_finished` of a source between `begin_offload` and `offload`: frees what is not needed any more.

        That is what has been written since, and with lora.rank 0 (and swap.offload_parameters) the parameter itself,
        as `Offloader.leave_early` can. Nothing may read the parameter until `onload`.
        """
        if self.config.swap.offload_parameters and not self.has_adapters:
            self._offloader.leave_early(parameter)
        self.reclaim()

    def gather_adapters(self) -> dict[str, torch.Tensor]:
        """All adapters, unsharded, float32, in the exchange format; on every rank."""
        self._require_trained("gather_adapters")
        if not self.has_adapters:
            return {}
        from qerl_rl.model.lora import gather_adapters

        return gather_adapters(self.model, self.architecture)

    def load_adapters(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Set the adapters from the exchange format, of whatever layout; Adam's moments stay as they are."""
        self._require_state("load_adapters")
        from qerl_rl.model.lora import load_adapters

        load_adapters(self.model, self.architecture, dict(tensors))
        self._state.optimizer.reload_model_params()

    def save_checkpoint(
        self,
        folder: str | Path,
        step: int,
        *,
        beside: Sequence[EngineSnapshot] = (),
        extra: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Write all that training needs to go on bit for bit; config.checkpoint.keep of them stay in `folder`.

        With `background` the call returns once the state is copied in memory; a thread of each rank writes it, and
        rank 0's makes it count when all have. The next save, or `finish_checkpoint`, waits for that.

        Args: beside: snapshots of other engines, to count or not together with this one's. extra: more for the meta,
            as JSON takes it.
        Raises: CheckpointError when this, or the one before in the background, could not be written.
        """
        self._require_state("save_checkpoint")
        self.finish_checkpoint()
        from qerl_rl.model.parallel import all_coordinates

        rank, ranks = dist.get_rank(), dist.get_world_size()
        adapters = self.gather_adapters()
        places = [dataclasses.asdict(place) for place in all_coordinates()]
        tensors: dict[str, torch.Tensor] = {}
        meta = {"layout": self._layout(), "places": places, **(extra or {})}
        for part in (self.snapshot(), *beside):
            tensors |= part.tensors
            meta |= part.meta
        keep, timeout_s = self.config.checkpoint.keep, self.config.fault.train_timeout_s
        if rank == 0:
            checkpoint.begin(folder, step)
        dist.barrier()

        def write() -> None:
            with checkpoint.naming(step):
                checkpoint.write_rank(folder, step, rank, tensors, adapters)
                if rank == 0:
                    checkpoint.wait_for_ranks(folder, step, ranks, timeout_s)
                    checkpoint.finish(folder, step, meta, keep)

        self._writer.start(write)
        if not background:
            self.finish_checkpoint()
            dist.barrier()

    def finish_checkpoint(self) -> None:
        """Until the checkpoint that is being written is on the disk. Raises: CheckpointError."""
        self._writer.wait()

    def snapshot(self) -> EngineSnapshot:
        """A copy of the state, as a checkpoint keeps it, with the random states of this process."""
        from qerl_rl.train import snapshot

        own = super().snapshot()
        return EngineSnapshot(own.tensors | snapshot.random_states(), own.meta)

    def _restore(self, tensors: Mapping[str, torch.Tensor], *, same_layout: bool) -> None:
        super()._restore(tensors, same_layout=same_layout)
        from qerl_rl.train import snapshot

        # The random states of another number of ranks mean nothing here.
        if same_layout:
            snapshot.set_random_states(tensors)

    def export(self, folder: str | Path) -> None:
        """Write the trained model for other programs, as `qerl_rl.train.export` describes."""
        self._require_state("export")
        from qerl_rl.model.weight_map import export_hf

        target, source = Path(folder), Path(self.config.model.path)
        weights = export_hf(self.model, self.architecture, merge_adapters=self.has_adapters)
        adapters = self.gather_adapters()
        if dist.get_rank() == 0:
            export.write_merged(target / "hf", source, weights)
            if adapters:
                export.write_adapters(
                    target / "adapter",
                    adapters,
                    architecture=self.architecture,
                    lora=self.config.lora,
                    base=str(source.resolve()),
                )
                checkpoint.write_durably(
                    target / checkpoint.ADAPTERS, lambda path: checkpoint.save_tensors(path, adapters)
                )
        else:
            # Its tensors come out on rank 0 only, but every rank takes part in gathering them.
            for _ in weights:
                pass
        dist.barrier()
