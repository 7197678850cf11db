"""Who gives the memory of an engine back and takes it again: on a CPU we do, on Ascend vLLM's sleep mode does."""

from __future__ import annotations

from typing import Any

from qerl_rl.rollout.ascend.sleep import AscendKvCache, AscendWeights, SleepMode
from qerl_rl.rollout.kv_cache import KvCacheMemory
from qerl_rl.rollout.weight_memory import WeightMemory

Memories = tuple[WeightMemory | AscendWeights, KvCacheMemory | AscendKvCache]


def engine_memory(worker: Any) -> Memories:
    """The weights and the KV cache of a worker of vLLM, which has loaded and allocated them."""
    from vllm.platforms import current_platform

    runner = worker.model_runner
    if current_platform.device_type == "npu":
        mode = SleepMode(worker)
        return AscendWeights(runner.model, mode), AscendKvCache(runner.kv_caches, mode)
    return WeightMemory(runner.model), KvCacheMemory(runner.kv_caches)
