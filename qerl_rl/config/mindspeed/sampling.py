"""What several keys of MindSpeed-RL's rollout sections together mean."""

from __future__ import annotations

from qerl_rl.config.mindspeed.draft import Draft
from qerl_rl.config.mindspeed.tables import ACTOR, GENERATE, RL, SAMPLING

CARD_BYTES = 64 << 30
"""Memory of a 910B card, and of a die of a 910C, in bytes."""
_BFLOAT16_BYTES = 2


def engine(draft: Draft) -> None:
    """Engines, their experts, and how much they compute and keep at once."""
    workers, tensor = draft.value("cluster.workers"), max(draft.count(GENERATE, "infer_tensor_parallel_size", 8), 1)
    if workers:
        draft.put("rollout.data_parallel", max(workers // tensor, 1), GENERATE, "infer_tensor_parallel_size")
    parts = draft.count(GENERATE, "infer_expert_parallel_size", 1)
    if draft.switch(GENERATE, "enable_expert_parallel") and workers and parts != workers:
        sentence = f"one engine's experts are split over all {workers} cards (rollout.expert_parallel)"
        draft.differ(GENERATE, "infer_expert_parallel_size", sentence, "rollout.expert_parallel")
    _expert_map(draft, parts, workers)
    longest = _longest(draft)
    tokens = draft.count(GENERATE, "max_num_batched_tokens", 2048)
    # vLLM, theirs too, prefills prompts in parts where a step has less room than the longest.
    draft.put("rollout.chunked_prefill", tokens < longest, GENERATE, "max_num_batched_tokens")
    draft.put("rollout.max_batched_tokens", tokens, GENERATE, "max_num_batched_tokens")
    _cache(draft, tensor, longest)


def _longest(draft: Draft) -> int:
    """Tokens of a prompt and its response; theirs cut off responses that do not fit."""
    longest = draft.count(GENERATE, "max_model_len", 2048)
    needed = draft.count(RL, "max_prompt_length", 512) + draft.count(SAMPLING, "max_tokens", 128)
    if needed <= longest:
        return longest
    draft.put("model.max_length", needed, GENERATE, "max_model_len")
    sentence = f"model.max_length is {needed}, so that every response fits behind its prompt"
    draft.differ(GENERATE, "max_model_len", sentence, "model.max_length")
    return needed


def _expert_map(draft: Draft, parts: int, workers: int | None) -> None:
    """A placement of experts is for one number of ranks."""
    path = draft.source.typed(GENERATE, "expert_map_path", str)
    if not path:
        return
    if parts == workers:
        draft.put("rollout.ascend.expert_map_path", path, GENERATE, "expert_map_path")
        return
    sentence = f"left out: it places experts on {parts} ranks, and they are split over {workers} here"
    draft.differ(GENERATE, "expert_map_path", sentence, "rollout.ascend.expert_map_path")


def _cache(draft: Draft, tensor: int, longest: int) -> None:
    """Half of what gpu_memory_utilization gives an engine on a 64 GiB card, unless max_num_seqs can't fill that."""
    layers, groups = draft.count(ACTOR, "num_layers", 0), draft.count(ACTOR, "num_query_groups", 1)
    heads = max(draft.count(ACTOR, "num_attention_heads", 1), 1)
    width = draft.count(ACTOR, "kv_channels", draft.count(ACTOR, "hidden_size", 0) // heads)
    if not draft.switch(ACTOR, "group_query_attention"):
        groups = heads
    token_bytes = 2 * layers * max(groups // tensor, 1) * width * _BFLOAT16_BYTES
    share = draft.number(GENERATE, "gpu_memory_utilization", 0.5)
    most = int(share * CARD_BYTES / 2)
    needed = draft.count(GENERATE, "max_num_seqs", 1) * longest * token_bytes
    draft.put("rollout.kv_cache_bytes", min(most, needed) or most, GENERATE, "gpu_memory_utilization")
    sentence = (
        "the KV cache has a size in bytes here; half of this share of 64 GiB is taken, or what max_num_seqs can fill"
    )
    draft.differ(GENERATE, "gpu_memory_utilization", sentence, "rollout.kv_cache_bytes")


def partial_rollouts(draft: Draft) -> None:
    """Responses that are finished over several steps. Theirs stop at max_tokens / splits, ours when enough are done."""
    splits = draft.count(RL, "partial_rollout_max_split", 1)
    if splits == 1:
        return
    key = "partial_rollout_max_split"
    if draft.value("algorithm.name") != "grpo":
        draft.fault(RL, key, f"set rl_config.{key}=1: only grpo carries prompts over", "rollout.carry_prompts")
        return
    # Theirs keep one batch more in flight than they learn from.
    draft.put("rollout.carry_prompts", draft.value("algorithm.prompts_per_step"), RL, key)
    draft.put("rollout.carry_max_age", max(splits - 1, 1), RL, key)
    sentence = "a step's rollout ends when enough groups are done, wherever the others are (rollout.carry_prompts)"
    draft.differ(RL, key, sentence, "rollout.carry_prompts")


def dpo_lengths(draft: Draft) -> None:
    """Their pairs are limited by the sequence alone; ours by prompt and response."""
    longest = draft.count(ACTOR, "seq_length", 512)
    for key, share in (("max_prompt_tokens", longest // 2), ("max_response_tokens", longest - longest // 2)):
        draft.put(f"rollout.{key}", share, ACTOR, "seq_length")
        draft.differ(ACTOR, "seq_length", f"rollout.{key} is half of it, longer pairs are an error", f"rollout.{key}")
    draft.put("rollout.max_batched_tokens", longest, ACTOR, "seq_length")
    draft.put("algorithm.samples_per_prompt", 2, ACTOR, "stage")
    draft.put("algorithm.kl_coefficient", 0.0, ACTOR, "stage")
