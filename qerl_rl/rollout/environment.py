"""The environment variables of a process that hosts vLLM; they must be set before vllm is imported."""

from __future__ import annotations

import logging
import os
import sys

from qerl_rl.config.schema import RolloutConfig
from qerl_rl.platform import detect

REQUIRED = {
    # The engine core lives in this process: its tensors are written to directly.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # The launcher decides which cores a worker has.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
NOTHING_COMPILED = {
    # Importing the compiler costs 4 s at the first construction and 3 s at the first step.
    "TORCHDYNAMO_DISABLE": "1"
}


def ask_for_batch_invariance(device: str) -> None:
    """Have an engine on `device` take kernels whose results don't depend on what else is in the batch, if it has them.

    vLLM has them for CUDA; vllm-ascend's are asked for in the launch file. A variable that the user has set stays.
    """
    if device == "cuda":
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")


def configure_environment(rollout: RolloutConfig | None = None) -> None:
    """Set what vLLM reads from the environment; a logging level that the user has set stays.

    rollout: what the engine will be made with; None on a CPU alone.
    Raises: RuntimeError when vllm is imported already with another setting.
    """
    rollout = rollout or RolloutConfig()
    on_npu = detect().name == "npu"
    # Graphs of an NPU are cut out by the compiler; a CPU has none.
    compiles = on_npu and not rollout.enforce_eager
    required = REQUIRED | ({} if compiles else NOTHING_COMPILED) | (rollout.ascend.variables if on_npu else {})
    if "vllm" in sys.modules:
        wrong = [name for name, value in required.items() if os.environ.get(name) != value]
        if wrong:
            raise RuntimeError(f"vllm was imported before configure_environment() had set {', '.join(wrong)}")
    os.environ.update(required)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vllm's own handler comes late in its import; what is logged before would go to stderr at any level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # In GiB, and it would win over rollout.kv_cache_bytes.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if "torch._dynamo" in sys.modules and not compiles:
        # Imported earlier (Megatron's adaptor does), it has read the environment already.
        sys.modules["torch._dynamo"].config.disable = True
