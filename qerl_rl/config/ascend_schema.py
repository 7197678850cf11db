"""The keys of a launch file that only the rollout engine of Ascend (vllm-ascend 0.23.0) knows."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AscendConfig:
    """rollout.ascend: how vllm-ascend runs the engine; without effect on other devices.

    qerl_rl/rollout/ascend_options.py says which option of the engine each key becomes.
    """

    card: str = "auto"
    """What the run is for: a2 (910B), a3 (910C) or auto. Rules that differ between them are checked by it."""
    graph_mode: str = "auto"
    """What is captured as a graph with rollout.enforce_eager: false. full_decode_only (whole steps of decoding, nothing
    else), piecewise (what lies between attention layers), full, full_and_piecewise, or auto (the engine's choice)."""
    capture_sizes: list[int] = field(default_factory=list)
    """Batch sizes, in tokens, to capture; empty takes the engine's own up to max_capture_size."""
    max_capture_size: int = 0
    """Largest batch, in tokens, to capture; 0 takes rollout.max_sequences, up to 512. Each size costs memory and
    streams."""
    sleep_mode: bool = True
    """Allocate weights and KV cache so that both can leave the card (swap.release_kv_cache, swap.release_weights)."""
    weight_nz_mode: int = 0
    """Layout of weights on the card: 0 as written, 1 FRACTAL_NZ where they are quantized, 2 everywhere. Weights that
    are replaced need 0."""
    batch_invariant: bool = False
    """Kernels and collectives whose results don't depend on what else is in the batch; slower, and in need of the
    operators that vllm-ascend's documentation tells to install."""
    matmul_all_reduce: bool = False
    """Fuse the products of row-parallel layers with their all-reduce (Atlas A2; best in eager mode)."""
    flash_comm: bool = False
    """Scatter tokens over the tensor-parallel ranks between layers (FlashComm1); for large batches."""
    fused_mc2: int = 0
    """Fuse experts with their dispatch (Atlas A3): 0 no, 1 dispatch_ffn_combine, 2 dispatch_gmm_combine_decode."""
    fused_int4_decode: bool = False
    """Compute W4A16 experts of steps of up to 64 rows (tokens times experts a token) in one Triton kernel instead of
    three operators. No card has measured yet what that gains; other formats are not changed by it."""
    hierarchical_mc2: bool = False
    """Let MC2 exchange tokens inside each machine first, then between machines."""
    overlap_shared_experts: bool = False
    """Compute shared experts on a stream of their own, beside the dispatch of the others."""
    bind_cpus: bool = False
    """Let the engine bind its process, which is the trainer's as well, to cores beside its card."""
    expert_map_path: str = ""
    """JSON file of vllm-ascend's that says which rank holds which experts (static load balancing); empty splits them
    evenly, in order."""
    dynamic_eplb: bool = False
    """Move and copy experts between ranks while the engine runs, after the load that each had."""
    eplb_record_path: str = ""
    """JSON file that dynamic_eplb writes its last placement to; empty writes none."""
    eplb_collection_steps: int = 600
    """Steps of the engine over which dynamic_eplb counts tokens."""
    eplb_algorithm_steps: int = 50
    """Steps of the engine that finding the new placement may take."""
    eplb_redundant_experts: int = 0
    """Copies of experts that dynamic_eplb may add, over all ranks."""
    eplb_policy: int = 2
    """Algorithm of the placement: 0 random, 1 DynamicEPLB, 2 SwiftBalancer, 3 FlashLB (vllm-ascend's numbers)."""
    eplb_stage: str = "all"
    """Steps whose load is counted: all, prefill or decode."""

    @property
    def moves_experts(self) -> bool:
        """Whether experts lie elsewhere than in order on the ranks."""
        return self.dynamic_eplb or bool(self.expert_map_path or self.eplb_record_path)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of the engine that these keys decide, with their values."""
        values = {name: getattr(self, key) for name, key in VARIABLE_KEYS.items()}
        return {
            name: str(int(value)) if name != "DYNAMIC_EPLB" else str(value).lower() for name, value in values.items()
        }


VARIABLE_KEYS = {
    "VLLM_ASCEND_ENABLE_NZ": "weight_nz_mode",
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE": "matmul_all_reduce",
    "VLLM_ASCEND_ENABLE_FLASHCOMM1": "flash_comm",
    "VLLM_ASCEND_ENABLE_FUSED_MC2": "fused_mc2",
    "VLLM_BATCH_INVARIANT": "batch_invariant",
    "DYNAMIC_EPLB": "dynamic_eplb",
}
"""Which key of rollout.ascend decides an environment variable of vLLM or vllm-ascend."""
