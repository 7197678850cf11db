"""The section train.mindspeed: switches of MindSpeed, by its names (branch 2.3.0_core_r0.12.1, features_manager/).

Some are answered by operators of this project, some are passed on to MindSpeed, and some can't act on this project's
experts and attention: `mindspeed_checks` refuses those with the reason. The defaults are what runs today.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MindSpeedConfig:
    """What the trainer does in Ascend's own way; each key keeps its name on MindSpeed's command line."""

    use_fused_rmsnorm: bool = True
    """Norms by torch_npu's kernel; false takes torch's operators, to find out which kernel a difference is from."""
    use_fused_swiglu: bool = True
    """The same of SwiGLU."""
    use_fused_rotary_pos_emb: bool = True
    """The same of the rotary embedding."""
    use_flash_attn: bool = True
    """The same of attention; false attends sequence by sequence, in memory that grows with the square of a length."""
    moe_grouped_gemm: bool = True
    """One call for all experts of a layer; false multiplies expert by expert."""
    use_fused_moe_token_permute_and_unpermute: bool = True
    """The dispatcher's sorting of tokens by expert, and back, by torch_npu's kernels (with alltoall)."""
    moe_layer_recompute: bool = False
    """Compute MoE layers again in backward, and nothing else; train.recompute: selective does so with attention."""

    optimization_level: int = 2
    """0 (MindSpeed patches what Megatron needs to run), 1 (and uses its own kernels) or 2 (and all of its features)."""
    optimizer_selection: str = "fused_adamw"
    """fused_adamw (torch_npu's kernel) or fused_torch_adamw; fused_ema_adamw is refused."""
    use_ascend_mc2: bool = False
    """Matrix products that overlap their collective (tensor_parallel > 1); only where linear layers are Megatron's own,
    with lora.rank: 0."""
    moe_tp_extend_ep: bool = False
    moe_permutation_async_comm: bool = False
    moe_alltoall_overlap_comm: bool = False
    moe_allgather_overlap_comm: bool = False
    moe_alltoall_mc2: bool = False
    moe_fb_overlap: bool = False
    moe_zero_memory: str = "disable"
    """disable, level0 or level1."""
    moe_zero_memory_num_layers: int = 0
    gemm_gradient_accumulation_fusion: bool = False
    recompute_activation_function: bool = False
    recompute_norm: bool = False
    swap_attention: bool = False
    swap_optimizer: bool = False
    reuse_fp32_param: bool = False
    use_ascend_coc: bool = False
    context_parallel_size: int = 1
    context_parallel_algo: str = "megatron_cp_algo"
    """megatron_cp_algo, ulysses_cp_algo, hybrid_cp_algo, hybrid_adaptive_cp_algo, adaptive_cp_algo or
    kvallgather_cp_algo."""
    use_cp_send_recv_overlap: bool = False
    npu_deterministic: bool = False
