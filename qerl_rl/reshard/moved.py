"""What of the policy a swap moves, and the layouts that a launch file means."""

from __future__ import annotations

import torch

from qerl_rl.config.schema import Config
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.tensors import Adapters, Tensors, Weights, full_tensors
from qerl_rl.layout.train import TrainLayout, parallel_sizes
from qerl_rl.model.formats import rounded_formats
from qerl_rl.quant.quantize import recipe_of
from qerl_rl.reshard.plan import Plan, make_plan


def moved_tensors(config: Config, architecture: MoeArchitecture) -> Tensors:
    """Adapters over a frozen base; with lora.rank=0 all weights, in the formats that the engine gets.

    Raises: ConfigError when the rows of a weight can't be cut into groups of its format.
    """
    if config.lora.rank:
        return Adapters(config.lora, getattr(torch, config.train.dtype))
    formats = rounded_formats(architecture, recipe_of(config.quant))
    return Weights(formats, getattr(torch, config.rollout.dtype))


def source_layout(config: Config, architecture: MoeArchitecture, tensors: Tensors) -> TrainLayout:
    """The trainer's."""
    return TrainLayout(architecture, parallel_sizes(config.train), config.cluster.workers, tensors)


def target_layout(config: Config, architecture: MoeArchitecture, tensors: Tensors) -> EngineLayout:
    """The engines'; without expert parallel each data-parallel rank is an engine that knows of no other."""
    rollout = config.rollout
    return EngineLayout(architecture, rollout.tensor_parallel, rollout.data_parallel, rollout.expert_parallel, tensors)


def plan_of(config: Config, architecture: MoeArchitecture, ranks_per_node: int) -> Plan:
    """The plan of a launch file's swaps to rollout. Raises: ConfigError where a layout can't hold this model."""
    tensors = moved_tensors(config, architecture)
    return make_plan(
        full_tensors(architecture, tensors),
        source_layout(config, architecture, tensors),
        target_layout(config, architecture, tensors),
        bucket_bytes=config.swap.bucket_bytes,
        ranks_per_node=ranks_per_node,
    )
