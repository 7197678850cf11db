"""Every key that MindSpeed-RL's launch files may have, and what becomes of it.

Names and defaults are those of the classes in its mindspeed_rl/config_cls (2026-04). A key is in one of the tables, or
it is unknown: rules take it over with a conversion, DERIVED is read by the functions beside `translate`, NEUTRAL may
only have the values that ask for nothing, NO_EFFECT and ARCHITECTURE are accepted and listed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

OPERATORS = (
    "use_fused_rmsnorm",
    "use_fused_swiglu",
    "use_fused_rotary_pos_emb",
    "use_flash_attn",
    "moe_grouped_gemm",
    "use_fused_moe_token_permute_and_unpermute",
)
"""Switches of fused operators, which keep their names in train.mindspeed."""
TRAINING, ACTOR, CRITIC, RL = "megatron_training", "actor_config", "critic_config", "rl_config"
GENERATE, SAMPLING = "generate_config", "generate_config.sampling_config"
PROFILER = "profiler_config.integrated"
ROLES = (TRAINING, ACTOR, CRITIC, "ref_config", "reward_config", "vit_config")
"""Sections of Megatron's keys: a role's own count first, then megatron_training's, then those of its model file."""
SECTIONS = (*ROLES, RL, GENERATE, "profiler_config", "msprobe_config")


def _same(value: Any) -> Any:
    return value


def _none_if_negative(value: Any) -> Any:
    return 0 if value == -1 else value


def _choice(names: Mapping[Any, str]) -> Callable[[Any], Any]:
    """Their name for it -> ours; another name stays, and our own check answers it."""
    return lambda value: names.get(value, value) if isinstance(value, Hashable) else value


def _inverse(value: Any) -> Any:
    return not value if isinstance(value, bool) else value


@dataclass(frozen=True)
class Rule:
    """One key of theirs that is one key of ours. default: what theirs is where it is not written; None leaves ours."""

    section: str
    key: str
    ours: str
    default: Any = None
    convert: Callable[[Any], Any] = _same


_TYPES = {True: "bfloat16", False: "float32"}
_KL = {"kl": "k1", "low_var_kl": "k3"}
_ADVANTAGES = {"group_norm": "grpo"}
_DISPATCHERS = {None: "alltoall", "alltoall_seq": "alltoall"}
_AGGREGATION = {True: "token_mean", False: "sequence_mean"}
_DPO_LOSSES = {"sigmoid": "dpo"}

TRAIN_RULES = (
    Rule(ACTOR, "train_iters", "run.steps"),
    Rule(ACTOR, "seed", "run.seed", 1234),
    Rule(ACTOR, "npu_deterministic", "run.deterministic"),
    Rule(ACTOR, "save", "run.output_dir"),
    Rule(ACTOR, "save_interval", "checkpoint.every"),
    Rule(ACTOR, "no_shuffle", "data.shuffle", False, _inverse),
    Rule(ACTOR, "bf16", "train.dtype", True, _choice(_TYPES)),
    Rule(ACTOR, "tensor_model_parallel_size", "train.tensor_parallel", 1),
    Rule(ACTOR, "pipeline_model_parallel_size", "train.pipeline_parallel", 1),
    Rule(ACTOR, "sequence_parallel", "train.sequence_parallel", False),
    Rule(ACTOR, "moe_token_dispatcher_type", "train.token_dispatcher", None, _choice(_DISPATCHERS)),
    Rule(ACTOR, "recompute_granularity", "train.recompute", "none", _choice({None: "none"})),
    *(Rule(ACTOR, name, f"train.mindspeed.{name}") for name in OPERATORS),
    Rule(ACTOR, "npu_deterministic", "run.deterministic"),
    Rule(ACTOR, "lr", "train.learning_rate"),
    Rule(ACTOR, "weight_decay", "train.weight_decay", 0.01),
    Rule(ACTOR, "clip_grad", "train.max_grad_norm", 1.0),
    Rule(ACTOR, "adam_beta1", "train.adam_beta1", 0.9),
    Rule(ACTOR, "adam_beta2", "train.adam_beta2", 0.999),
)
RL_RULES = (
    Rule(RL, "n_samples_per_prompt", "algorithm.samples_per_prompt", 1),
    Rule(RL, "mini_batch_size", "algorithm.prompts_per_mini_batch", 1),
    Rule(RL, "epochs", "algorithm.epochs_per_step", 1),
    Rule(RL, "gamma", "algorithm.discount", 1.0),
    Rule(RL, "lam", "algorithm.gae_lambda", 0.95),
    Rule(RL, "adv_estimator", "algorithm.advantage", "group_norm", _choice(_ADVANTAGES)),
    Rule(RL, "entropy_coeff", "algorithm.entropy_coefficient", 0.0),
    Rule(RL, "kl_penalty", "algorithm.kl_estimator", "low_var_kl", _choice(_KL)),
    Rule(RL, "token_level_loss", "algorithm.loss_aggregation", True, _choice(_AGGREGATION)),
    Rule(RL, "max_prompt_length", "rollout.max_prompt_tokens", 512),
    Rule(RL, "verifier_parallel", "reward.workers", 1),
    Rule(RL, "verifier_timeout", "reward.timeout_s", 30),
    Rule(RL, "use_tensorboard", "track.tensorboard", False),
    Rule(GENERATE, "infer_tensor_parallel_size", "rollout.tensor_parallel", 8),
    Rule(GENERATE, "enable_expert_parallel", "rollout.expert_parallel", False),
    Rule(GENERATE, "max_num_seqs", "rollout.max_sequences", 1),
    Rule(GENERATE, "max_model_len", "model.max_length", 2048),
    Rule(GENERATE, "dtype", "rollout.dtype", "bfloat16"),
    Rule(GENERATE, "enforce_eager", "rollout.enforce_eager", True),
    Rule(GENERATE, "enable_prefix_caching", "rollout.prefix_caching", False),
    Rule(GENERATE, "offload_train_param", "swap.offload_parameters", False),
    Rule(GENERATE, "offload_train_grad", "swap.offload_gradients", False),
    Rule(GENERATE, "offload_train_optimizer", "swap.offload_optimizer", False),
    Rule(SAMPLING, "max_tokens", "rollout.max_response_tokens", 128),
    Rule(SAMPLING, "temperature", "rollout.temperature", 0.2),
    Rule(SAMPLING, "top_p", "rollout.top_p", 1.0),
    Rule(SAMPLING, "top_k", "rollout.top_k", 50, _none_if_negative),
    Rule(SAMPLING, "min_p", "rollout.min_p", 0.0),
)
PPO_RULES = (
    Rule(CRITIC, "lr", "critic.learning_rate"),
    Rule(RL, "cliprange_value", "critic.value_clip", 0.5),
)
DPO_RULES = (
    Rule(ACTOR, "dpo_loss_type", "dpo.loss", "sigmoid", _choice(_DPO_LOSSES)),
    Rule(ACTOR, "global_batch_size", "algorithm.prompts_per_mini_batch"),
    Rule(ACTOR, "seq_length", "model.max_length"),
)

DERIVED = {
    "role": """model stage load data_path tokenizer_name_or_path global_batch_size seq_length micro_batch_size
        expert_model_parallel_size moe_tp_extend_ep recompute_method recompute_num_layers lr_decay_style min_lr
        lr_warmup_fraction lora_r lora_alpha lora_target_modules num_layers num_experts
        num_layer_list noop_layers moe_router_load_balancing_type moe_aux_loss_coeff gemm_gradient_accumulation_fusion
        moe_permutation_async_comm moe_alltoall_overlap_comm
        recompute_activation_function swap_attention
        swap_optimizer reuse_fp32_param use_ascend_coc context_parallel_algo use_cp_send_recv_overlap""",
    RL: """actor_resource critic_resource use_dynamic_bsz max_packing_token_size update_max_packing_token_size
        clip_ratio clip_higher_enable clip_ratio_low clip_ratio_high init_kl_coef kl_ctrl_type kl_horizon kl_target
        use_kl_in_reward overlong_buffer_enable overlong_buffer overlong_buffer_penalty_factor filter_groups_enable
        filter_groups_max_batches filter_groups_train_batch_size partial_rollout_max_split verifier_function
        verifier_weight runtime_env_path hccl_buffersize""",
    GENERATE: """max_num_batched_tokens gpu_memory_utilization infer_expert_parallel_size sampling_config
        expert_map_path""",
    SAMPLING: "",
    "profiler_config": "integrated",
    PROFILER: """profile profile_step_start profile_step_end stage profile_ranks profile_level profile_export_type
        profile_analysis profile_with_memory profile_record_shapes""",
    "msprobe_config": "",
}


@dataclass(frozen=True)
class Neutral:
    """A key that may be left out or ask for nothing. allowed: those values. fix: what to do with any other.

    instead: a key of ours which, set on the command line, settles the matter.
    """

    allowed: tuple[Any, ...]
    fix: str
    instead: str = ""


NEUTRAL: dict[str, dict[str, Neutral]] = {
    "role": {
        "context_parallel_size": Neutral((1,), "set actor_config.context_parallel_size=1: sequences are not split"),
        "optimizer": Neutral(("adam",), "set actor_config.optimizer=adam, the only one here"),
        "attention_dropout": Neutral((0,), "set megatron_training.attention_dropout=0"),
        "hidden_dropout": Neutral((0,), "set megatron_training.hidden_dropout=0"),
        "skip_train": Neutral((False,), "evaluate with eval.every=1 run.steps=1"),
        "prompt_type": Neutral((None,), "set megatron_training.prompt_type=null and data.chat_template=true"),
        "mm_model": Neutral((None,), "use a language model: nothing else is trained"),
        "ai_framework": Neutral((None,), "set actor_config.ai_framework=null: PyTorch alone"),
    },
    RL: {
        "multi_turn_enable": Neutral(
            (False,), "set rl_config.multi_turn_enable=false: no tools are called in a rollout"
        ),
        "is_multimodal": Neutral((False,), "use a language model: nothing else is trained"),
        "rule_reward": Neutral(
            (True,), "set rl_config.rule_reward=true, and a reward model as reward_model.path=FOLDER"
        ),
        "reward_resource": Neutral((None,), "set rl_config.reward_resource=null and reward_model.path=FOLDER"),
        "use_integrated_worker": Neutral(
            (True,), "set rl_config.use_integrated_worker=true: all models share the cards"
        ),
        "shuffle_mini_batch": Neutral((False,), "set rl_config.shuffle_mini_batch=false"),
        "advantage_whiten": Neutral((True,), "set rl_config.advantage_whiten=true"),
    },
    GENERATE: {"infer_pipeline_parallel_size": Neutral((1,), "set generate_config.infer_pipeline_parallel_size=1")},
    SAMPLING: {},
    "profiler_config": {},
    PROFILER: {},
    "msprobe_config": {"msprobe": Neutral((False,), "set msprobe_config.msprobe=false: nothing is dumped")},
}

NO_EFFECT = {
    "role": """use_mcore_models spec transformer_impl shape_order no_bias_dropout_fusion no_masked_softmax_fusion
        no_gradient_accumulation_fusion attention_softmax_in_fp32 coc_mode coc_parallel_num coc_fused_kernel
        use_distributed_optimizer distributed_backend overlap_grad_reduce overlap_param_gather ddp_bucket_size
        accumulate_allreduce_grads_in_fp32 num_layers_per_virtual_pipeline_stage use_tp_pp_dp_mapping
        use_fused_ring_attention_update attention_mask_type reset_attention_mask reset_position_ids no_shared_storage
        no_pad_to_seq_lengths pad_to_multiple_of variable_seq_lengths tokenizer_type tokenizer_not_use_fast
        tokenizer_padding_side vocab_extra_ids prompt_type_path dataset_additional_keys is_pairwise_dataset
        is_instruction_dataset full_shuffle_instruction_dataset dataloader_type num_workers split eval_iters
        eval_interval log_interval log_throughput initial_loss_scale init_method_std
        no_check_for_nan_in_loss_and_grad enable_high_availability finetune no_load_optim no_load_rng no_save_optim
        no_save_rng load_checkpoint_loosely pretrained_checkpoint ref_model refer_model_iter do_sample use_kv_cache
        algorithm lora_fusion lora_ckpt_filter seq_aux""",
    RL: """blocking async_engine guarantee_order data_strategy zmq_communication transfer_queue_data_shard_num
        transfer_queue_data_shard_port_base num_cpus_for_local_task num_cpus_for_placement_group
        use_dp_batch_balance integrated_mode_config reference_resource vit_resource share_backbone beta
        num_samples_per_step tp_split_expert ref_forward_micro_batch_size actor_forward_micro_batch_size
        vit_forward_micro_batch_size actor_rollout_dispatch_size actor_logprob_dispatch_size ref_dispatch_size
        reward_dispatch_size dynamic_sampling_dispatch_size adv_dispatch_size actor_update_dispatch_size
        critic_update_dispatch_size critic_value_dispatch_size kl_dispatch_size actor_image_embeds_dispatch_size
        use_remove_padding ref_max_packing_token_size actor_max_packing_token_size dynamic_max_batch_size
        ref_dynamic_max_batch_size actor_dynamic_max_batch_size update_dynamic_max_batch_size reuse_image_embeds
        colocate_actor_and_vit log_max_throughput filter_groups_metric rollout_max_tokens
        require_max_age_all_finished use_wandb wandb_project wandb_exp_name wandb_save_dir use_swanlab swanlab_mode
        swanlab_project swanlab_exp_name swanlab_save_dir tool_config_path max_tool_calls max_parallel_calls
        max_total_response_length max_tool_response_length tool_response_truncate_side tool_parser_format""",
    GENERATE: """limit_mm_image_per_prompt limit_mm_video_per_prompt data_parallel_size tokenizer_name_or_path
        trust_remote_code eplb_token_collects eplb_token_save_path num_scheduler_steps
        torchair_graph ascend_scheduler_config_enabled""",
    SAMPLING: "logprobs detokenize seed",
    "profiler_config": "",
    PROFILER: "mstx profile_save_path profile_with_cpu profile_with_npu profile_with_module",
    "msprobe_config": """dump_path categories actor_infer_dump actor_train_dump critic_train_dump reference_dump
        reward_dump configurations_dump key_data_dump step_start step_end token_range_start token_range_end""",
}

ARCHITECTURE = """multi_latent_attention first_k_dense_replace moe_layer_freq rope_scaling_type
    moe_router_enable_expert_bias moe_router_score_function moe_router_num_groups
    moe_router_group_topk hidden_size ffn_hidden_size num_attention_heads kv_channels
    group_query_attention num_query_groups untie_embeddings_and_output_weights qk_pos_emb_head_dim
    qk_head_dim q_lora_rank kv_lora_rank v_head_dim qk_layernorm n_shared_experts
    moe_ffn_hidden_size moe_router_topk moe_router_topk_scaling_factor norm_topk_prob
    make_vocab_size_divisible_by padded_vocab_size add_qkv_bias disable_bias_linear attention_bias
    position_embedding_type rotary_base normalization norm_epsilon swiglu
    use_rotary_position_embeddings max_position_embeddings original_max_position_embeddings
    rope_scaling_factor low_freq_factor high_freq_factor beta_fast beta_slow rope_scaling_mscale
    rope_scaling_mscale_all_dim rope_scaling_original_max_position_embeddings"""
"""What the config.json of model.path says of the model, and MindSpeed-RL's model files once more."""


def known_keys(section: str) -> set[str]:
    """Every key that a section may have (of a role: any of them)."""
    kind = "role" if section in ROLES else section
    rules = (*TRAIN_RULES, *RL_RULES, *PPO_RULES, *DPO_RULES)
    of_rules = {rule.key for rule in rules if (rule.section in ROLES if kind == "role" else rule.section == section)}
    listed = " ".join((DERIVED[kind], NO_EFFECT[kind], ARCHITECTURE if kind == "role" else ""))
    return of_rules | set(NEUTRAL[kind]) | set(listed.split())
