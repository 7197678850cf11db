"""Which experts the engine chose for each token: what the trainer replays (R3, arXiv 2510.11370).

vLLM returns them itself (`enable_return_routed_experts`) where its newer model runner works, which needs Triton; a CPU
has none. There `record_on_cpu` reads the same hooks of the routers, and hands the rows out through the same field of
vLLM's outputs, `CompletionOutput.routed_experts`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.rollout.ascend.routing import record_quantized_experts
from qerl_rl.rollout.vllm_objects import model_runner


class SlotRecords:
    """The experts of every token in the KV cache, kept by the slot of the cache that the token has.

    A prefix that is found in the cache, by another sample or after a preemption, is not computed again; its slots still
    hold the experts that its keys and values came from.

    It stands in a vLLM scheduler's place for auxiliary outputs, whose interface the methods are.

    Args: scheduler: vLLM's, of this process. slots, block_size: tokens of the KV cache and of one of its blocks.
        layers, top_k: of the model. dtype: holds an expert's number.
    """

    def __init__(
        self, scheduler: Any, *, slots: int, block_size: int, layers: int, top_k: int, dtype: torch.dtype
    ) -> None:
        self._scheduler, self._block_size = scheduler, block_size
        self._experts = torch.zeros(slots, layers, top_k, dtype=dtype)

    def keep(self, slots: torch.Tensor, experts: torch.Tensor) -> None:
        """Experts int [tokens, layers, top_k] that one step of the engine chose; slots: int64 [tokens]."""
        self._experts[slots] = experts.to(self._experts.dtype)

    def take_output(self, request: Any, output: Any) -> np.ndarray | None:
        """All rows of a request that has finished, while its blocks are still its own; no row for its last token."""
        if not request.is_finished():
            return None
        (blocks,) = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        positions = torch.arange(request.num_tokens - 1)
        slots = torch.tensor(blocks)[positions // self._block_size] * self._block_size + positions % self._block_size
        return self._experts[slots].numpy()

    def build_connector_meta(self, scheduler_output: Any, requests: Any) -> None:
        """The runner needs no instructions."""

    def request_finished(self, request: Any) -> None:
        """Nothing is kept by request."""

    def reset(self) -> None:
        """Slots are written again before they are read: whatever the cache forgets is computed anew."""


def routing_engine(arguments: Any) -> Any:
    """The vLLM LLMEngine that EngineArgs describe, which also returns the experts of each finished sample.

    Raises: RuntimeError where this vLLM works otherwise than known.
    """
    from vllm import LLMEngine
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        if current_platform.device_type == "npu":
            record_quantized_experts()
        return LLMEngine.from_engine_args(replace(arguments, enable_return_routed_experts=True))
    engine = LLMEngine.from_engine_args(arguments)
    record_on_cpu(engine)
    return engine


def no_experts(model: MoeArchitecture) -> np.ndarray:
    """The routed experts of no token, as GroupOutput has them: [0, layers, top_k]."""
    dtype = np.uint8 if model.experts <= 256 else np.int16
    return np.empty((0, model.layers, model.experts_per_token), dtype)


def record_on_cpu(engine: Any) -> None:
    """Make a vLLM LLMEngine of this process return the experts of each finished sample.

    They are uint8 (uint16 above 256 experts) [prompt + response - 1, layers, top_k]: the last token sampled is never
    computed.

    Raises: RuntimeError where this vLLM works otherwise.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
        RoutedExpertsCapturer,
        bind_routed_experts_capturer,
    )

    runner = model_runner(engine)
    scheduler = engine.engine_core.engine_core.scheduler
    if not hasattr(scheduler, "aux_output_connector"):
        raise RuntimeError("vLLM's scheduler has no aux_output_connector: qerl_rl/rollout/routing.py is out of date")
    if len(runner.kv_cache_config.kv_cache_groups) != 1:
        raise RuntimeError("routing replay needs a model whose layers share one kind of KV cache")
    # It picks this data-parallel rank's tokens out of those that the experts get from all ranks.
    capturer = RoutedExpertsCapturer(runner.max_num_tokens, engine.vllm_config)
    bind_routed_experts_capturer(runner.model, capturer)
    layers, top_k = capturer.shape_per_token
    block_size = runner.cache_config.block_size
    records = SlotRecords(
        scheduler,
        slots=runner.kv_cache_config.num_blocks * block_size,
        block_size=block_size,
        layers=layers,
        top_k=top_k,
        dtype=capturer.output_dtype,
    )
    scheduler.aux_output_connector = records
    original = runner.execute_model

    def execute_model(scheduler_output: Any, *arguments: Any, **options: Any) -> Any:
        result = original(scheduler_output, *arguments, **options)
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens:
            slots = runner.input_batch.block_table[0].slot_mapping.cpu[:tokens]
            records.keep(slots, capturer.device_buffer[:tokens])
        return result

    runner.execute_model = execute_model


def routed_experts_of(sample: Any, dtype: np.dtype, dense_layers: int = 0) -> np.ndarray:
    """The rows of a finished sample, a vLLM CompletionOutput, as `dtype` [tokens, layers, top_k].

    The first `dense_layers` route nothing: theirs read 0, 1, ..., as rows do whose experts are distinct.

    Raises: RuntimeError when there are none, or a token has an expert twice: nothing was recorded then (vLLM-Ascend
        returned zeros for some models, vllm-project/vllm-ascend#16314).
    """
    experts = sample.routed_experts
    if experts is None:
        raise RuntimeError("the engine returned no routed experts: this vLLM does not record them")
    if dense_layers:
        experts = experts.copy()
        experts[:, :dense_layers] = np.arange(experts.shape[-1])
    ordered = np.sort(experts, axis=-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise RuntimeError(
            "the engine returned routed experts that it did not record (a token has one of them twice): "
            "set router_replay.mode to disabled, or use another version of vLLM"
        )
    return experts.astype(dtype, copy=False)
