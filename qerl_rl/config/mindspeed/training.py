"""What several keys of MindSpeed-RL's training sections together mean: cards, batches, losses, adapters."""

from __future__ import annotations

from qerl_rl.config.mindspeed.draft import Draft
from qerl_rl.config.mindspeed.tables import ACTOR, CRITIC, RL

UNLIMITED_ROUNDS = 10
"""Rollouts of a step, at most, where theirs have no limit: a policy that solves everything would sample for ever."""
_TARGETS = {"linear_qkv": "attention", "linear_proj": "attention", "linear_fc1": "experts", "linear_fc2": "experts"}


def cards(draft: Draft) -> None:
    """Workers and the split of experts. dpo is started by torchrun there, so its file does not say how many."""
    source = draft.source
    tensor, pipeline = (draft.count(ACTOR, f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline"))
    experts = draft.count(ACTOR, "expert_model_parallel_size", 1)
    extend = draft.switch(ACTOR, "moe_tp_extend_ep")
    # Extended, each of tensor x expert ranks holds whole experts; otherwise tensor ranks split every one of them.
    draft.put("train.expert_parallel", experts * tensor if extend else experts, ACTOR, "expert_model_parallel_size")
    draft.put("train.expert_tensor_parallel", 1 if extend else tensor, ACTOR, "moe_tp_extend_ep")
    if not source.has(RL):
        draft.put("cluster.workers", tensor * pipeline * experts, ACTOR, "tensor_model_parallel_size")
        draft.put("rollout.data_parallel", tensor * pipeline * experts, ACTOR, "tensor_model_parallel_size")
        draft.differ(ACTOR, "tensor_model_parallel_size", "cluster.workers is the smallest number", "cluster.workers")
        return
    resource = source.typed(RL, "actor_resource", dict, {})
    workers = resource.get("num_npus")
    if type(workers) is not int or workers < 1:
        draft.fault(RL, "actor_resource", "set rl_config.actor_resource.num_npus=N, the cards", "cluster.workers")
        return
    draft.put("cluster.workers", workers, RL, "actor_resource")
    for name in ("tensor", "pipeline"):
        key = f"{name}_model_parallel_size"
        if source.has(CRITIC) and draft.count(CRITIC, key, 1) != draft.count(ACTOR, key, 1):
            draft.differ(CRITIC, key, "the critic is split like the policy")


def batches(draft: Draft) -> None:
    """Prompts of a step and tokens of a micro-batch. Their batch sizes count prompts, as ours do."""
    algorithm = draft.value("algorithm.name")
    step = draft.count(ACTOR, "global_batch_size", 1)
    section, key = ACTOR, "global_batch_size"
    if algorithm == "dapo" and draft.switch(RL, "filter_groups_enable"):
        section, key = RL, "filter_groups_train_batch_size"
        generated, step = step, draft.count(section, key, 1)
        rounds = draft.count(RL, "filter_groups_max_batches", 1)
        if rounds < 1:
            rounds = UNLIMITED_ROUNDS
            sentence = f"a step samples at most {rounds} times (algorithm.sampling_rounds)"
            draft.differ(RL, "filter_groups_max_batches", sentence, "algorithm.sampling_rounds")
        draft.put("algorithm.sampling_rounds", rounds, RL, "filter_groups_max_batches")
        if generated != step:
            sentence = f"each rollout asks for the groups that are missing of {step}, not for {generated}"
            draft.differ(ACTOR, "global_batch_size", sentence, "algorithm.prompts_per_step")
    draft.put("algorithm.prompts_per_step", step, section, key)
    _micro_batches(draft)


def _micro_batches(draft: Draft) -> None:
    """Samples are packed here, so that what counts is their tokens."""
    if draft.switch(RL, "use_dynamic_bsz"):
        key = "update_max_packing_token_size"
        if draft.source.name_of(RL, key) is None:
            key = "max_packing_token_size"
        draft.put("train.micro_batch_tokens", draft.count(RL, key, 4096), RL, key)
        return
    longest = draft.count(ACTOR, "seq_length", draft.value("model.max_length") or 2048)
    size = draft.count(ACTOR, "micro_batch_size", 1)
    draft.put("train.micro_batch_tokens", size * longest, ACTOR, "micro_batch_size")


def schedule(draft: Draft) -> None:
    """The learning rate rises over a share of the run and stays: it does not fall here."""
    style = draft.source.get(ACTOR, "lr_decay_style", "linear")
    rate, least = draft.number(ACTOR, "lr", 0.0), draft.number(ACTOR, "min_lr", 0.0)
    if style != "constant" and least != rate:
        if draft.source.name_of(ACTOR, "lr_decay_style") is None:
            fix = "is linear by default; set actor_config.lr_decay_style=constant, the only one here"
        else:
            fix = "set actor_config.lr_decay_style=constant: the learning rate does not fall here"
        draft.fault(ACTOR, "lr_decay_style", fix, "train.warmup_steps")
    share = draft.number(ACTOR, "lr_warmup_fraction", 0.0)
    step = draft.value("algorithm.prompts_per_step")
    mini_batches = step // max(draft.count(RL, "mini_batch_size", step), 1)
    updates = draft.count(ACTOR, "train_iters", 0) * max(mini_batches, 1) * draft.count(RL, "epochs", 1)
    draft.put("train.warmup_steps", round(share * updates), ACTOR, "lr_warmup_fraction")
    if draft.source.has(CRITIC):
        share = draft.number(CRITIC, "lr_warmup_fraction", 0.0)
        draft.put("critic.warmup_steps", round(share * updates), CRITIC, "lr_warmup_fraction")


def objective(draft: Draft) -> None:
    """Clipping, KL and the overlong penalty."""
    source, algorithm = draft.source, draft.value("algorithm.name")
    low = high = "clip_ratio"
    if draft.switch(RL, "clip_higher_enable"):
        low, high = "clip_ratio_low", "clip_ratio_high"
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.1}
    draft.put("algorithm.clip_low", draft.number(RL, low, defaults[low]), RL, low)
    draft.put("algorithm.clip_high", draft.number(RL, high, defaults[high]), RL, high)
    coefficient, in_reward = draft.number(RL, "init_kl_coef", 0.01), draft.switch(RL, "use_kl_in_reward")
    # Of their trainers only grpo's loss has a KL, only ppo's reward can have one, and dapo has none.
    counts = algorithm == "grpo" or (algorithm == "ppo" and in_reward)
    draft.put("algorithm.kl_coefficient", coefficient if counts else 0.0, RL, "init_kl_coef")
    draft.put("algorithm.kl_in", "reward" if algorithm == "ppo" else "loss", RL, "use_kl_in_reward")
    kind = source.get(RL, "kl_ctrl_type", "fixed")
    if kind == "adaptive" and counts:
        draft.put("algorithm.kl_target", draft.number(RL, "kl_target", 100.0), RL, "kl_target")
        draft.put("algorithm.kl_horizon", draft.count(RL, "kl_horizon", 1000), RL, "kl_horizon")
    elif kind not in ("fixed", "adaptive"):
        draft.fault(RL, "kl_ctrl_type", "set rl_config.kl_ctrl_type to fixed or adaptive", "algorithm.kl_target")
    if draft.switch(RL, "overlong_buffer_enable"):
        draft.put("algorithm.overlong_buffer_tokens", draft.count(RL, "overlong_buffer", 0), RL, "overlong_buffer")
        key = "overlong_buffer_penalty_factor"
        draft.put("algorithm.overlong_penalty", draft.number(RL, key, 1.0), RL, key)


def adapters(draft: Draft) -> None:
    """LoRA as they set it; without it every weight trains, there as here."""
    targets = draft.source.typed(ACTOR, "lora_target_modules", list)
    if not targets:
        draft.put("lora.rank", 0, ACTOR, "lora_target_modules")
        return
    unknown = [target for target in targets if target not in _TARGETS]
    if unknown:
        draft.fault(ACTOR, "lora_target_modules", f"leave out {', '.join(map(str, unknown))}", "lora.attention")
    for part in ("attention", "experts"):
        of_part = [name for name, place in _TARGETS.items() if place == part]
        draft.put(f"lora.{part}", any(name in targets for name in of_part), ACTOR, "lora_target_modules")
        if 0 < len(set(of_part) & set(targets)) < len(of_part):
            draft.differ(ACTOR, "lora_target_modules", f"{' and '.join(of_part)} have adapters together")
    draft.put("lora.rank", draft.count(ACTOR, "lora_r", 8), ACTOR, "lora_r")
    draft.put("lora.alpha", draft.number(ACTOR, "lora_alpha", 16.0), ACTOR, "lora_alpha")
