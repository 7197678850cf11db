"""A model on this rank, frozen or not: where it stands, its packed samples, its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qerl_rl.config.schema import Config
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.model.formats import stored_formats
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.platform.state_store import StateStore, state_store
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.train.exchange import largest_over
from qerl_rl.train.offload import Offloader
from qerl_rl.train.packing import Pack, make_pack, partition_alike
from qerl_rl.train.samples import Samples

if TYPE_CHECKING:
    from qerl_rl.train.adoption import Adoption
    from qerl_rl.train.passes import Passes


class ModelEngine:
    """The model at config.model.path in the layout of config.train, with the adapters of config.lora (rank 0: none).

    Runs on every rank; the caller has initialised the default process group. All methods are collective, and ranks of
    one data-parallel rank pass the same samples. Engines of one process share Megatron's groups, never a store.

    Args: head: what its output layer gives, `qerl_rl.layout.slots.LANGUAGE_MODEL` or `VALUE`. store: takes what leaves
        memory; by default the one for its device, where that is a file in the folder for temporary files.
    Raises: ConfigError for a model or a layout that can't be used.
    """

    _passes: Passes

    def __init__(self, config: Config, store: StateStore | None, *, head: str) -> None:
        self.config = config
        device = detect(config.train.device)
        prepare_megatron(device, config)
        # These import megatron, which must see the prepared process.
        from qerl_rl.model.build import build_model
        from qerl_rl.model.parallel import initialize_parallel
        from qerl_rl.model.weight_map import load_hf

        self.device = device.current()
        initialize_parallel(config.train, seed=config.run.seed)
        self.architecture = MoeArchitecture.from_folder(config.model.path)
        lora = config.lora if config.lora.rank > 0 else None
        self.has_adapters = lora is not None
        with CheckpointReader(config.model.path) as reader:
            formats = stored_formats(reader, self.architecture)
            self.model = build_model(self.architecture, config.train, lora, formats, head=head, seed=config.run.seed)
            """The GPTModel of this rank."""
            load_hf(self.model, reader, self.architecture)
        # Built and filled in the host's memory, since a checkpoint is read there.
        self.model.to(self.device)
        self._store = store or state_store(device)
        self._offloader = Offloader(self._store)

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
        """Whether scores are returned here: tensor-parallel rank 0 of the last pipeline stage."""
        return self._parallel.is_pipeline_last_stage() and self._parallel.get_tensor_model_parallel_rank() == 0

    # ---- compute

    def _packs(self, samples: Samples, together: int = 1) -> list[Pack]:
        train = self.config.train
        group = self._parallel.get_data_parallel_group()
        batches = partition_alike(
            samples.lengths, train.micro_batch_tokens, lambda count: largest_over(group, count, self.device), together
        )
        return [make_pack(samples, batch, train.tensor_parallel, self.device) for batch in batches]

    def _scores(self, packs: Sequence[Pack], samples: int) -> list[list[np.ndarray]] | None:
        """Each score of the packs, as one float32 array a sample in the samples' order; None off `is_output_rank`."""
        found = self._passes.scores(packs)
        return by_sample(packs, found, samples) if self.is_output_rank else None

    # ---- memory

    def offload(self) -> dict[str, int]:
        """Move out of memory what config.swap names. Returns the bytes that left, by kind."""
        self._track()
        return self._offloader.offload(self._leaving_kinds())

    def begin_offload(self) -> dict[str, int]:
        """Let all of that leave but the parameters that train, which can still be read; `offload` goes on from there.

        Returns the bytes that leave, by kind.
        """
        self._track()
        return self._offloader.begin_offload(self._leaving_kinds(), only_frozen=["parameters"])

    def reclaim(self) -> None:
        """Free the memory of what has left since `begin_offload`."""
        self._offloader.reclaim()

    def _leaving_kinds(self) -> list[str]:
        swap = self.config.swap
        switches = {
            "gradients": swap.offload_gradients,
            "optimizer": swap.offload_optimizer,
            "parameters": swap.offload_parameters,
        }
        return [kind for kind, switch in switches.items() if switch]

    def onload(self) -> dict[str, int]:
        """Bring everything back (gradients as zeros). Returns the bytes that come back, by kind.

        The optimizer's state may still be on its way: what needs it waits for it.
        """
        return self._offloader.onload()

    def adopt_experts(self, offered: Sequence[StoredExperts]) -> Adoption:
        """Read frozen experts where another engine of this process stores them, and give up the own copies.

        Not collective: each rank has what its own process can give it. Raises: RuntimeError while state is away.
        """
        self._require_state("adopt_experts")
        from qerl_rl.train.adoption import adopt_experts

        return adopt_experts(self.model, self.architecture, offered, self._offloader.forget)

    def finish_moves(self) -> None:
        """Until all that leaves has left and all that returns is back."""
        self._offloader.finish()

    def held_bytes(self) -> dict[str, int]:
        """Bytes of the engine's state in memory now: parameters, gradients, optimizer."""
        self._track()
        return self._offloader.held_bytes()

    @property
    def is_away(self) -> bool:
        """Whether part of the state is out of memory, so that nothing can be computed."""
        return self._offloader.is_away

    def _track(self) -> None:
        """Tell the offloader of all state there is by now."""
        self._offloader.track("parameters", [*self.model.parameters(), *self.model.buffers()], frozen=True)

    def _require_state(self, purpose: str) -> None:
        self._require_parameters(purpose)
        self.finish_moves()

    def _require_parameters(self, purpose: str) -> None:
        """Enough for passes, which the optimizer's state may still be on its way beside."""
        if self.is_away:
            raise RuntimeError(f"{purpose} needs the train state in memory: call onload() first")

    def _require_trained(self, purpose: str) -> None:
        """What trains can be read, also while the rest leaves (`begin_offload`)."""
        if not self._offloader.holds(parameter for parameter in self.model.parameters() if parameter.requires_grad):
            raise RuntimeError(f"{purpose} needs the trained parameters in memory: call onload() first")


def by_sample(packs: Sequence[Pack], found: Sequence[tuple[torch.Tensor, ...]], samples: int) -> list[list[np.ndarray]]:
    """Scores of one or more packs, cut into those of each sample and put in the order of the samples."""
    scores: list[list[np.ndarray]] = [[np.empty(0)] * samples for _ in found[0]]
    for pack, values in zip(packs, found, strict=True):
        lengths = pack.response_lengths.tolist()
        for of_kind, flat in zip(scores, values, strict=True):
            for index, part in zip(pack.indices, flat.cpu().split(lengths), strict=True):
                of_kind[index] = part.numpy()
    return scores
