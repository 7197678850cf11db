"""What trains: Megatron's DDP and distributed optimizer around a model. Import after `prepare_megatron`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

from qerl_rl.config.schema import TrainConfig
from qerl_rl.train.offload import Offloader


@dataclass
class TrainState:
    """The model of this rank, its gradient buffers and its share of the optimizer."""

    model: torch.nn.Module
    ddp: DistributedDataParallel
    optimizer: Any

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters of this rank by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def shards(self) -> Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]:
        """(name, float32 shard, its Adam state) of every part of a parameter that this rank's optimizer updates.

        The state is the optimizer's own dict, empty before the first update; filling it sets the state.
        """
        names = {parameter: name for name, parameter in self.trainable().items()}
        for part in self.optimizer.chained_optimizers:
            pairs = (
                (part.model_fp32_groups, part.shard_fp32_groups),
                (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            )
            for parameter_groups, shard_groups in pairs:
                for parameters, shards in zip(parameter_groups, shard_groups, strict=True):
                    for parameter, shard in zip(parameters, shards, strict=True):
                        yield names[parameter], shard, part.optimizer.state[shard]

    def shard_runs(self) -> dict[str, slice]:
        """The elements of each flattened parameter that this rank's optimizer updates, where it updates any."""
        names = {parameter: name for name, parameter in self.trainable().items()}
        runs = {}
        for part in self.optimizer.chained_optimizers:
            for parameter in part.model_param_gbuf_map:
                run = part._get_model_param_range_map(parameter)["param"]
                runs[names[parameter]] = slice(run.start, run.end)
        return runs

    def track(self, offloader: Offloader) -> None:
        """Tell the offloader of all state there is; Adam's appears with the first update, so call it again then."""
        # What trains lies in the buffers of DDP; a float32 shard of the optimizer is a view of them.
        buffers = [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]
        offloader.track("gradients", [buffer.grad_data for buffer in buffers])
        offloader.track("parameters", [buffer.param_data for buffer in buffers])
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        offloader.track("parameters", frozen, frozen=True)
        # A frozen base under adapters; without them a router's bias, which goes to the engine with what trains.
        offloader.track("parameters", self.model.buffers(), frozen=self.model.lora is not None)
        for _, shard, moments in self.shards():
            offloader.track("optimizer", [shard, *moments.values()])

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def zero_gradients(self) -> None:
        # The optimizer takes its gradients from these buffers at each step: its own zero_grad has nothing to do.
        self.ddp.zero_grad_buffer()


def _mark_split_parameters(model: torch.nn.Module) -> None:
    """Say which parameters are split over tensor-parallel ranks: the others count once in the gradient norm.

    Megatron's layers say so themselves only when they also draw their first weights, which load_hf makes superfluous.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            for parameter in module.parameters(recurse=False):
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        elif isinstance(module, RowParallelLinear):
            # Its bias is not split.
            module.weight.tensor_model_parallel = True


def _put_embedding_last(model: torch.nn.Module) -> None:
    """Let the first pipeline stage's embedding come first in the buffers of DDP, which are filled from the end.

    A tied embedding has a bucket of its own where there are several stages. Megatron-core 0.12.1 takes its place in the
    buffer before it pads the bucket ahead, which overlaps it then unless that happens to end at 128 elements.
    """
    if "embedding" in model._modules:
        model._modules["embedding"] = model._modules.pop("embedding")


def build_state(model: torch.nn.Module, config: TrainConfig) -> TrainState:
    """Wrap `model` in DDP with a distributed Adam (gradients and moments in float32).

    Raises: ValueError when the model has nothing to train.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no trainable parameter on this rank")
    _mark_split_parameters(model)
    _put_embedding_last(model)
    distributed = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=True
    )
    ddp = DistributedDataParallel(model.config, distributed, model)
    dtype = getattr(torch, config.dtype)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.max_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        [ddp],
        use_gloo_process_groups=False,
    )
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.no_sync_func = ddp.no_sync
    model.config.finalize_model_grads_func = finalize_model_grads
    return TrainState(model, ddp, optimizer)
