"""What each key may be by itself: one of a few words, or a number from a bound on."""

from __future__ import annotations

CHOICES: dict[str, tuple[str | int, ...]] = {
    "cluster.placement": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    "model.share_base": ("auto", "never"),
    "model.provider": ("megatron", "mindspeed_llm"),
    "train.device": ("auto", "cpu", "cuda", "npu", "npu-sim"),
    "train.dtype": ("float32", "bfloat16"),
    "train.token_dispatcher": ("alltoall", "allgather", "alltoall_seq"),
    "train.router_load_balancing": (
        "auto",
        "none",
        "aux_loss",
        "softmax_topk",
        "sinkhorn",
        "group_limited_greedy",
        "sparsemixer_topk",
    ),
    "train.recompute": ("none", "full", "selective"),
    "train.recompute_method": ("uniform", "block"),
    "train.mindspeed.optimizer_selection": ("fused_adamw", "fused_torch_adamw", "fused_ema_adamw"),
    "train.mindspeed.moe_zero_memory": ("disable", "level0", "level1"),
    "train.mindspeed.context_parallel_algo": (
        "megatron_cp_algo",
        "ulysses_cp_algo",
        "hybrid_cp_algo",
        "hybrid_adaptive_cp_algo",
        "adaptive_cp_algo",
        "kvallgather_cp_algo",
    ),
    "rollout.dtype": ("float32", "bfloat16"),
    "rollout.kv_cache_dtype": ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"),
    "rollout.ascend.card": ("auto", "a2", "a3"),
    "rollout.ascend.graph_mode": ("auto", "piecewise", "full", "full_decode_only", "full_and_piecewise"),
    "rollout.ascend.weight_nz_mode": (0, 1, 2),
    "rollout.ascend.fused_mc2": (0, 1, 2),
    "rollout.ascend.eplb_policy": (0, 1, 2, 3),
    "rollout.ascend.eplb_stage": ("all", "prefill", "decode"),
    "swap.checksum": ("never", "first", "always"),
    "swap.canary": ("never", "first", "always"),
    "quant.format": ("w8a8", "w4a16", "w4a8", "nvfp4", "mxfp4", "mxfp8", "none"),
    "lora.in_rollout": ("auto", "adapter", "merge"),
    "lora.merge_rounding": ("stochastic", "nearest"),
    "router_replay.mode": ("disabled", "R3"),
    "noise.schedule": ("exponential", "linear", "cosine", "logarithmic", "constant"),
    "noise.log_probs": ("clean", "noisy"),
    "algorithm.name": ("grpo", "dapo", "ppo", "dpo"),
    "dpo.loss": ("dpo", "ipo", "cdpo"),
    "algorithm.loss_aggregation": ("token_mean", "sequence_mean", "sequence_sum_constant"),
    "algorithm.kl_in": ("loss", "reward"),
    "reward_model.backend": ("hf", "megatron"),
    "rollout_correction.rollout_is": ("none", "token", "sequence"),
    "rollout_correction.loss_type": ("ppo_clip", "reinforce"),
    "profiler.kind": ("torch", "msprof"),
    "profiler.level": ("none", "level0", "level1", "level2"),
    "profiler.aic_metrics": (
        *("none", "pipe_utilization", "arithmetic_utilization", "memory", "memory_l0", "memory_ub"),
        *("resource_conflict_ratio", "l2_cache", "memory_access"),
    ),
    "profiler.export": ("text", "db"),
    "track.console": ("auto", "lines", "quiet"),
}

AT_LEAST = {
    1: """algorithm.kl_horizon algorithm.sampling_rounds
    run.steps cluster.workers cluster.threads_per_worker model.max_length train.tensor_parallel
    train.pipeline_parallel train.expert_parallel train.expert_tensor_parallel train.micro_batch_tokens
    train.recompute_layers train.mindspeed.context_parallel_size
    rollout.tensor_parallel rollout.data_parallel rollout.max_sequences rollout.max_batched_tokens
    rollout.kv_cache_bytes rollout.kv_block_tokens rollout.carry_max_age
    rollout.ascend.eplb_collection_steps rollout.ascend.eplb_algorithm_steps
    eval.samples reward.length_characters
    rollout.max_prompt_tokens rollout.max_response_tokens algorithm.prompts_per_step
    algorithm.prompts_per_mini_batch algorithm.epochs_per_step reward.workers dock.capacity_bytes checkpoint.keep
    eval.prompts track.samples_per_step algorithm.samples_per_prompt""",
    2: "noise.stages",
    1024: "swap.bucket_bytes",
    0: """train.mindspeed.optimization_level train.mindspeed.moe_zero_memory_num_layers
    dpo.flip_probability critic.learning_rate critic.warmup_steps critic.head_start_steps reward_model.max_length
    reward.memory_bytes data.max_prompt_tokens
    lora.rank cluster.cpus_per_worker train.learning_rate train.warmup_steps train.weight_decay train.max_grad_norm
    rollout.ascend.max_capture_size rollout.ascend.eplb_redundant_experts
    rollout.top_k noise.sigma_start noise.sigma_end algorithm.clip_low algorithm.clip_high algorithm.kl_coefficient
    algorithm.entropy_coefficient algorithm.loss_constant_tokens algorithm.kl_target algorithm.overlong_buffer_tokens
    algorithm.overlong_penalty rollout.carry_prompts algorithm.discount data.limit checkpoint.every eval.every
    swap.canary_tolerance train.router_aux_loss_coefficient train.router_num_groups
    train.router_group_topk""",
}

POSITIVE = """eval.temperature critic.value_clip dpo.beta
lora.alpha rollout.temperature reward.timeout_s dock.timeout_s fault.start_timeout_s
fault.rollout_timeout_s fault.train_timeout_s train.adam_eps"""
