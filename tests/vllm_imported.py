"""Imported once by the server that `run_engines` forks its processes from."""

import gc

from qerl_rl.rollout.environment import configure_environment

gc.set_threshold(100_000)
# vLLM reads the environment when it is imported.
configure_environment()
import vllm  # noqa: E402
from vllm import LLMEngine  # noqa: E402

__all__ = ["LLMEngine", "vllm"]
