"""The trainer of one rank: a Megatron model with its optimizer, over packed samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from qerl_rl.algorithms.sequences import AGGREGATIONS, TOKEN_MEAN
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config
from qerl_rl.model.architecture import MoeArchitecture
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.noise import Noise
from qerl_rl.train import checkpoint, export
from qerl_rl.train.background import BackgroundJob
from qerl_rl.train.exchange import largest_over, sum_over_ranks
from qerl_rl.train.norm_noise import noisy_norms
from qerl_rl.train.offload import Offloader, SpillFile, StateStore
from qerl_rl.train.packing import Pack, make_pack, partition_alike
from qerl_rl.train.samples import Samples

if TYPE_CHECKING:
    from qerl_rl.train.passes import LossFunction

PARALLEL_SIZES = ("tensor_parallel", "pipeline_parallel", "expert_parallel", "expert_tensor_parallel")


@dataclass(frozen=True)
class TokenScores:
    """log_probs and entropy in nats: per sample float32 [response_length], in the order of the samples."""

    log_probs: list[np.ndarray]
    entropy: list[np.ndarray]


class TrainEngine:
    """Trains the adapters of the model at config.model.path (with lora.rank 0 and no quantization, all of it).

    Runs on every rank; the caller has initialised the default process group. All methods are collective, and ranks of
    one data-parallel rank pass the same samples. `store` takes the state that leaves memory; by default an unlinked
    file in the folder for temporary files.
    Raises: ConfigError for a model or a layout that can't be used.
    """

    def __init__(self, config: Config, store: StateStore | None = None) -> None:
        self.config = config
        device = detect(config.train.device)
        prepare_megatron(device)
        # These import megatron, which must see the prepared process.
        from qerl_rl.model.build import build_model
        from qerl_rl.model.parallel import initialize_parallel
        from qerl_rl.model.weight_map import load_hf
        from qerl_rl.train.passes import Passes
        from qerl_rl.train.state import build_state

        self.device = device.current()
        initialize_parallel(config.train, seed=config.run.seed)
        self.architecture = MoeArchitecture.from_folder(config.model.path)
        lora = config.lora if config.lora.rank > 0 else None
        self.has_adapters = lora is not None
        model = build_model(self.architecture, config.train, lora, config.quant.format == "w8a8", seed=config.run.seed)
        with CheckpointReader(config.model.path) as reader:
            load_hf(model, reader, self.architecture)
        self._state = build_state(model, config.train)
        self._passes = Passes(
            self._state.ddp,
            vocabulary=self.architecture.vocabulary_size,
            temperature=config.rollout.temperature,
        )
        self._offloader = Offloader(store or SpillFile())
        self._state.track(self._offloader)
        self._writer: BackgroundJob[None] = BackgroundJob("checkpoint")
        self.updates = 0
        """Optimizer updates done."""

    # ---- where this rank is

    @property
    def _parallel(self) -> Any:
        from megatron.core import parallel_state

        return parallel_state

    @property
    def data_parallel_rank(self) -> int:
        return self._parallel.get_data_parallel_rank()

    @property
    def data_parallel_size(self) -> int:
        return self._parallel.get_data_parallel_world_size()

    @property
    def is_output_rank(self) -> bool:
        """Whether `log_probs` returns its result here: tensor-parallel rank 0 of the last pipeline stage."""
        return self._parallel.is_pipeline_last_stage() and self._parallel.get_tensor_model_parallel_rank() == 0

    @property
    def model(self) -> torch.nn.Module:
        """The GPTModel of this rank."""
        return self._state.model

    # ---- compute

    def log_probs(self, samples: Samples, *, adapters: bool = True, noise: Noise | None = None) -> TokenScores | None:
        """Log-probs of the response tokens, and entropies, at rollout.temperature; None except on `is_output_rank`.

        adapters=False gives those of the reference: the base model, whatever has been trained since. With `noise` they
        are those of the policy with that noise on its layer norms.
        Raises: ValueError for adapters=False where everything trains: the reference is gone.
        """
        self._require_state("log_probs")
        if not adapters and not self.has_adapters:
            raise ValueError("adapters=False needs adapters: with lora.rank=0 the base itself has been trained")
        from qerl_rl.model.lora import adapters_disabled

        packs = self._packs(samples)
        with noisy_norms(self.model, noise or Noise()), nullcontext() if adapters else adapters_disabled(self.model):
            found = self._passes.scores(packs)
        if not self.is_output_rank:
            return None
        return _by_sample(samples, packs, found)

    def update(
        self, samples: Samples, loss_function: LossFunction, *, aggregation: str = "token_mean"
    ) -> dict[str, float]:
        """One optimizer update on the samples of all data-parallel ranks.

        The loss of each token counts alike (token_mean), that of each sample (sequence_mean), or a sample's is the sum
        over its tokens / config.loss_constant_tokens (sequence_sum_constant), whatever the layout and micro-batches.

        Args: loss_function(log_probs [T], entropy [T], columns {name: [T]}, token_weights [T]) -> (loss, metrics): the
            sum over the T tokens of weight * loss with its gradients, and sums over the tokens by name.
        Returns, the same on every rank: each metric divided by all response tokens, `loss` (divided by all tokens or
            samples), `grad_norm` (before clipping) and `learning_rate`.
        Raises: ValueError when no rank has a response token; FloatingPointError when the gradient norm is not finite.
        """
        self._require_state("update")
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation {aggregation!r} is neither {' nor '.join(AGGREGATIONS)}")
        packs = self._packs(samples)
        learning_rate = self._learning_rate()
        self._state.set_learning_rate(learning_rate)
        self._state.zero_gradients()
        constant = self.config.loss_constant_tokens
        sums = self._passes.accumulate_gradients(packs, loss_function, aggregation=aggregation, constant=constant)
        counts = {"#tokens": float(samples.response_tokens), "#samples": float(len(samples))}
        totals = sum_over_ranks({**sums, **counts} if self.is_output_rank else {}, self.device)
        tokens, sequences = totals.pop("#tokens"), totals.pop("#samples")
        if not tokens:
            raise ValueError("update got no response token on any rank")
        _, grad_norm, _ = self._state.optimizer.step()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"the gradient norm of update {self.updates + 1} is {grad_norm}")
        self.updates += 1
        metrics = {name: value / tokens for name, value in totals.items() if name != "loss"}
        loss = totals["loss"] / (tokens if aggregation == TOKEN_MEAN else sequences)
        return {**metrics, "loss": loss, "grad_norm": float(grad_norm), "learning_rate": learning_rate}

    def _packs(self, samples: Samples) -> list[Pack]:
        train = self.config.train
        group = self._parallel.get_data_parallel_group()
        batches = partition_alike(
            samples.lengths, train.micro_batch_tokens, lambda count: largest_over(group, count, self.device)
        )
        return [make_pack(samples, batch, train.tensor_parallel, self.device) for batch in batches]

    def _learning_rate(self) -> float:
        warmup = self.config.train.warmup_steps
        return self.config.train.learning_rate * min(1.0, (self.updates + 1) / max(warmup, 1))

    # ---- memory

    def offload(self) -> dict[str, int]:
        """Move out of memory what config.swap names. Returns the bytes that left, by kind."""
        self._state.track(self._offloader)
        swap = self.config.swap
        switches = {
            "parameters": swap.offload_parameters,
            "gradients": swap.offload_gradients,
            "optimizer": swap.offload_optimizer,
        }
        return self._offloader.offload(kind for kind, switch in switches.items() if switch)

    def onload(self) -> dict[str, int]:
        """Bring everything back (gradients as zeros). Returns the bytes that came back, by kind."""
        return self._offloader.onload()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of train state in memory now: parameters, gradients, optimizer."""
        self._state.track(self._offloader)
        return self._offloader.held_bytes()

    def _require_state(self, purpose: str) -> None:
        if self._offloader.is_away:
            raise RuntimeError(f"{purpose} needs the train state in memory: call onload() first")

    # ---- adapters and checkpoints

    def gather_adapters(self) -> dict[str, torch.Tensor]:
        """All adapters, unsharded, float32, in the exchange format; on every rank."""
        self._require_state("gather_adapters")
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
        self, folder: str | Path, step: int, *, extra: Mapping[str, Any] | None = None, background: bool = False
    ) -> None:
        """Write all that training needs to go on bit for bit; config.checkpoint.keep of them stay in `folder`.

        With `background` the call returns once the state is copied in memory; a thread of each rank writes it, and
        rank 0's makes it count when all have. The next save, or `finish_checkpoint`, waits for that.

        Args: extra: more for the meta, as JSON takes it.
        Raises: CheckpointError when this, or the one before in the background, could not be written.
        """
        self._require_state("save_checkpoint")
        self.finish_checkpoint()
        from qerl_rl.model.parallel import all_coordinates
        from qerl_rl.train import snapshot

        rank, ranks = dist.get_rank(), dist.get_world_size()
        tensors, adapters = snapshot.take(self._state), self.gather_adapters()
        places = [dataclasses.asdict(place) for place in all_coordinates()]
        meta = {"updates": self.updates, "layout": self._layout(), "places": places, **(extra or {})}
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

    def load_checkpoint(self, folder: str | Path, step: int | None = None) -> int:
        """Continue from the checkpoint of `step` in `folder` (by default the newest complete one); returns its step.

        Written by the same layout, everything goes on bit for bit. From another layout, weights and optimizer are
        regrouped, and the random states stay as they are: those of another number of ranks mean nothing here.
        Raises: ConfigError when there is none, it is broken, or its adapters are others.
        """
        self._require_state("load_checkpoint")
        from qerl_rl.train import snapshot

        meta, own = checkpoint.read_meta(folder, step), self._layout()
        written = meta["layout"]
        different = {key for key in own if written.get(key) != own[key]}
        fixed = {key for key in different if key.startswith("lora.") or not self.has_adapters}
        if fixed:
            pairs = ", ".join(f"{key}={written.get(key)} (now {own[key]})" for key in sorted(fixed))
            raise ConfigError(f"the checkpoint was written with {pairs}.", fix="set that back, or start anew")
        tensors = (
            self._regrouped(folder, meta) if different else checkpoint.load_rank(folder, meta["step"], dist.get_rank())
        )
        snapshot.restore(self._state, tensors, with_random=not different)
        self.updates = meta["updates"]
        return meta["step"]

    def _regrouped(self, folder: str | Path, meta: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """This rank's share of a checkpoint that another layout wrote."""
        from qerl_rl.layout.blocks import Coordinates, ParallelSizes
        from qerl_rl.model.parallel import current_coordinates, current_sizes
        from qerl_rl.model.slots import adapter_slots
        from qerl_rl.train.regroup import full_state, local_state

        written, layers = meta["layout"], self.architecture.layers
        sizes = ParallelSizes(*(written[f"train.{name}"] for name in PARALLEL_SIZES))
        slots = adapter_slots(self.architecture, self.config.lora)
        places = [Coordinates(**place) for place in meta["places"]]
        shards = ((place, checkpoint.load_rank(folder, meta["step"], place.rank)) for place in places)
        return local_state(
            slots,
            full_state(slots, shards, layers=layers, sizes=sizes),
            layers=layers,
            sizes=current_sizes(),
            here=current_coordinates(),
            shapes={name: parameter.shape for name, parameter in self._state.trainable().items()},
            runs=self._state.shard_runs(),
        )

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

    def _layout(self) -> dict[str, Any]:
        train, lora = self.config.train, self.config.lora
        return {
            "ranks": dist.get_world_size(),
            **{f"train.{name}": getattr(train, name) for name in PARALLEL_SIZES},
            "train.dtype": train.dtype,
            "lora.rank": lora.rank,
            "lora.attention": lora.attention,
            "lora.experts": lora.experts,
        }


def _by_sample(
    samples: Samples, packs: Sequence[Pack], found: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> TokenScores:
    """Scores of packs, cut into those of each sample and put in the order of the samples."""
    scores: tuple[list[np.ndarray], list[np.ndarray]] = ([np.empty(0)] * len(samples), [np.empty(0)] * len(samples))
    for pack, values in zip(packs, found, strict=True):
        lengths = pack.response_lengths.tolist()
        for by_sample, flat in zip(scores, values, strict=True):
            for index, part in zip(pack.indices, flat.cpu().split(lengths), strict=True):
                by_sample[index] = part.numpy()
    return TokenScores(*scores)
