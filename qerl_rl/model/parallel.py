"""Process groups of the training layout."""

from __future__ import annotations

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.blocks import Coordinates, ParallelSizes
from qerl_rl.layout.train import check_world, parallel_sizes

_layers_per_stage: list[int] = []
"""Of the groups that exist: Megatron's groups know of stages, not of what is on them."""


def initialize_parallel(train: TrainConfig, seed: int = 1) -> None:
    """Create Megatron's process groups for the layout of `train` and seed its random-number tracker.

    Call after `prepare_megatron` and torch.distributed.init_process_group. Models of one process share the groups: a
    second call finds them there and changes nothing.
    Raises: ConfigError when the sizes don't fit the number of processes. RuntimeError when there are groups of another
    layout.
    """
    world = torch.distributed.get_world_size()
    sizes = parallel_sizes(train)
    if parallel_state.model_parallel_is_initialized():
        if current_sizes() != sizes:
            raise RuntimeError(f"this process has groups for {current_sizes()}, a model wants {sizes}")
        return
    check_world(sizes, world)
    if sizes.expert_tensor not in (1, sizes.tensor):
        raise ConfigError(
            f"train.expert_tensor_parallel={sizes.expert_tensor} is neither 1 nor tensor_parallel={sizes.tensor}.",
            fix=f"set train.expert_tensor_parallel to 1 or {sizes.tensor}",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        expert_model_parallel_size=sizes.expert,
        expert_tensor_parallel_size=sizes.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed)
    _layers_per_stage[:] = sizes.layers_per_stage


def current_sizes() -> ParallelSizes:
    """The layout of the process groups that exist."""
    return ParallelSizes(
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
        tuple(_layers_per_stage),
    )


def current_coordinates() -> Coordinates:
    """Where this rank stands."""
    return Coordinates(
        rank=torch.distributed.get_rank(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_rank(),
        expert_data=parallel_state.get_expert_data_parallel_rank(),
    )


def all_coordinates() -> list[Coordinates]:
    """Where every rank of the world stands, by global rank. Collective."""
    found: list[Coordinates] = [None] * torch.distributed.get_world_size()  # type: ignore[list-item]
    torch.distributed.all_gather_object(found, current_coordinates())
    return found
