"""The options that vLLM's engine is made with, from the section rollout of a launch file."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from qerl_rl.config.schema import RolloutConfig
from qerl_rl.rollout.ascend_options import ascend_arguments
from qerl_rl.rollout.limits import NPU_PLATFORMS
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.loader import loader_options


def engine_arguments(plan: LoadPlan, rollout: RolloutConfig, max_length: int, seed: int) -> Any:
    """vLLM's EngineArgs for an engine of this process. max_length: tokens of prompt and response together."""
    from vllm import EngineArgs

    on_npu = plan.platform in NPU_PLATFORMS
    return EngineArgs(
        model=str(plan.reader.path),
        **loader_options(plan),
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=rollout.dtype,
        max_model_len=max_length,
        max_num_seqs=rollout.max_sequences,
        max_num_batched_tokens=rollout.max_batched_tokens,
        kv_cache_memory_bytes=rollout.kv_cache_bytes,
        # int8 on NPUs is what the checkpoint's description asks for, not an option.
        kv_cache_dtype="auto" if on_npu else rollout.kv_cache_dtype,
        block_size=rollout.kv_block_tokens,
        enable_prefix_caching=rollout.prefix_caching,
        enable_chunked_prefill=rollout.chunked_prefill,
        enforce_eager=rollout.enforce_eager,
        tensor_parallel_size=rollout.tensor_parallel,
        data_parallel_size=rollout.data_parallel if rollout.expert_parallel else 1,
        enable_expert_parallel=rollout.expert_parallel and rollout.tensor_parallel * rollout.data_parallel > 1,
        distributed_executor_backend="external_launcher" if dist.is_initialized() else "uni",
        logprobs_mode="processed_logprobs",
        seed=seed,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **(ascend_arguments(rollout) if on_npu else {}),
    )
