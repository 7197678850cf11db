"""The environment variables of a process that hosts vLLM; they must be set before vllm is imported."""

from __future__ import annotations

import logging
import os
import sys

REQUIRED = {
    # The engine core lives in this process: its tensors are written to directly.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Nothing here is compiled; importing the compiler costs 4 s at the first construction and 3 s at the first step.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # The launcher decides which cores a worker has.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def ask_for_batch_invariance(device: str) -> None:
    """Have an engine on `device` take kernels whose results don't depend on what else is in the batch, if it has them.

    vLLM has them for CUDA; vllm-ascend's are asked for in the launch file. A variable that the user has set stays.
    """
    if device == "cuda":
        os.environ.setdefault("VLLM_BATCH_INVARIANT", "1")


def configure_environment() -> None:
    """Set what vLLM reads from the environment; a logging level that the user has set stays.

    Raises: RuntimeError when vllm is imported already with another setting.
    """
    if "vllm" in sys.modules:
        wrong = [name for name, value in REQUIRED.items() if os.environ.get(name) != value]
        if wrong:
            raise RuntimeError(f"vllm was imported before configure_environment() had set {', '.join(wrong)}")
    os.environ.update(REQUIRED)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vllm's own handler comes late in its import; what is logged before would go to stderr at any level.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # In GiB, and it would win over rollout.kv_cache_bytes.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if "torch._dynamo" in sys.modules:
        # Imported earlier (Megatron's adaptor does), it has read the environment already.
        sys.modules["torch._dynamo"].config.disable = True
