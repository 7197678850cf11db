"""The section rollout.ascend in the words of vllm-ascend 0.23.0: environment variables, additional_config, EngineArgs.

Some options are read from additional_config in one place of the engine and from the environment in another (waking up
asks the first for the weights' layout, replacing weights the second), so both say the same.

Left out, since they change which part of a weight a rank holds, and replacing weights goes by qerl_rl/layout:
enable_shared_expert_dp, finegrained_tp_config, layer_sharding, mix_placement. An enable_sleep_mode_extra_cleanup would
destroy process groups that the trainer shares; enable_static_kernel takes SIGTERM for itself.
"""

from __future__ import annotations

from typing import Any

from qerl_rl.config.ascend_schema import AscendConfig
from qerl_rl.config.schema import RolloutConfig

MEMORY_SHARE = 0.01
"""What the worker demands to find free of its card, where the trainer may be already; kv_cache_memory_bytes counts."""


def ascend_arguments(rollout: RolloutConfig) -> dict[str, Any]:
    """The EngineArgs that only an engine on NPUs gets."""
    ascend = rollout.ascend
    arguments = {
        "additional_config": additional_config(ascend),
        "enable_sleep_mode": ascend.sleep_mode,
        "gpu_memory_utilization": MEMORY_SHARE,
    }
    return arguments if rollout.enforce_eager else arguments | _graphs(ascend)


def additional_config(ascend: AscendConfig) -> dict[str, Any]:
    """What vllm-ascend's AscendConfig reads; a key that it does not know it would ignore."""
    return {
        "weight_nz_mode": ascend.weight_nz_mode,
        "enable_matmul_allreduce": ascend.matmul_all_reduce,
        "enable_flashcomm1": ascend.flash_comm,
        "enable_fused_mc2": ascend.fused_mc2,
        "enable_mc2_hierarchy_comm": ascend.hierarchical_mc2,
        "multistream_overlap_shared_expert": ascend.overlap_shared_experts,
        "enable_cpu_binding": ascend.bind_cpus,
        "eplb_config": _balancing(ascend),
    }


def _balancing(ascend: AscendConfig) -> dict[str, Any]:
    """Expert load balancing: EplbConfig refuses keys that it does not know, and paths that are no paths."""
    paths = {"expert_map_path": ascend.expert_map_path, "expert_map_record_path": ascend.eplb_record_path}
    return {
        "dynamic_eplb": ascend.dynamic_eplb,
        "expert_heat_collection_interval": ascend.eplb_collection_steps,
        "algorithm_execution_interval": ascend.eplb_algorithm_steps,
        "num_redundant_experts": ascend.eplb_redundant_experts,
        "eplb_policy_type": ascend.eplb_policy,
        "eplb_heat_collection_stage": ascend.eplb_stage,
        **{key: path for key, path in paths.items() if path},
    }


def _graphs(ascend: AscendConfig) -> dict[str, Any]:
    """What is captured; an option that is not given is left to the engine."""
    given: dict[str, Any] = {}
    if ascend.graph_mode != "auto":
        given["compilation_config"] = {"cudagraph_mode": ascend.graph_mode.upper()}
    if ascend.capture_sizes:
        given["cudagraph_capture_sizes"] = sorted(ascend.capture_sizes)
    elif ascend.max_capture_size:
        given["max_cudagraph_capture_size"] = ascend.max_capture_size
    return given
