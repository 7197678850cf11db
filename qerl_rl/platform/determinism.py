"""What makes a process compute the same bits again, on each device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

VARIABLES: dict[str, dict[str, str]] = {
    # Of CANN (hiascend.com, environment variables); vllm-ascend's batch-invariant mode sets all five.
    "npu": {
        # Sums of collectives, of HCCL and of the library beside it, in one order.
        "HCCL_DETERMINISTIC": "true",
        "LCCL_DETERMINISTIC": "1",
        # A matrix product begins its sum at the same place on every core.
        "CLOSE_MATMUL_K_SHIFT": "1",
        "ATB_MATMUL_SHUFFLE_K_ENABLE": "0",
        # No product that sends parts of itself while it computes the others.
        "ATB_LLM_LCOC_ENABLE": "0",
    },
    # Those that Megatron-LM demands for --deterministic-mode.
    "cuda": {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    },
    "cpu": {},
}
_STRICTER = {"HCCL_DETERMINISTIC": ("strict",), "CUBLAS_WORKSPACE_CONFIG": (":16:8",), "NCCL_ALGO": ("Tree", "^NVLS")}
"""Values that do as well as those."""


def deterministic_variables(device: str) -> dict[str, str]:
    """Environment of a process on `device` (a value of train.device), to be set before it imports anything."""
    kinds = list(VARIABLES) if device == "auto" else [device.partition("-")[0]]
    # The order of a set of texts, which Python else draws for each process.
    return {"PYTHONHASHSEED": "0"} | {name: value for kind in kinds for name, value in VARIABLES[kind].items()}


def contradiction(device: str, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(name, value) of a variable that must have that value where `environment` gives it another; None without one."""
    for name, value in deterministic_variables(device).items():
        own = environment.get(name, value)
        # YAML's true is Python's True in an environment.
        if name != "PYTHONHASHSEED" and own.lower() != value.lower() and own not in _STRICTER.get(name, ()):
            return name, value
    return None


def compute_deterministically() -> None:
    """From now on this process's operators repeat their bits, or raise where they can't."""
    # An operator that reads what nobody wrote is a fault that tests find; writing all of it costs each empty tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
