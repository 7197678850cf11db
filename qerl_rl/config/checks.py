"""What must hold between keys, whatever the model and the data."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

from qerl_rl.config.bounds import AT_LEAST, CHOICES, POSITIVE
from qerl_rl.config.correction_checks import Fault, correction_fault
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.mindspeed_checks import mindspeed_fault
from qerl_rl.config.profiler_checks import profiler_fault
from qerl_rl.config.router_checks import router_fault
from qerl_rl.config.schema import Config

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "mse")
Locate = Callable[[str], str]


def check_config(config: Config, locate: Locate) -> None:
    """Raise ConfigError for the first value, or pair of values, that can't work."""
    for check in CHECKS:
        fault = check(config)
        if fault:
            key, problem, fix = fault
            raise ConfigError(problem, fix=fix, where=locate(key))


def _get(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _check_values(config: Config) -> Fault:
    for key, allowed in CHOICES.items():
        if _get(config, key) not in allowed:
            return key, f"{key}={_get(config, key)} is unknown.", f"set {key} to {' or '.join(map(str, allowed))}"
    for least, keys in AT_LEAST.items():
        for key in keys.split():
            if _get(config, key) < least:
                return key, f"{key}={_get(config, key)} is too small.", f"set {key} to {least} or more"
    for key in POSITIVE.split():
        if _get(config, key) <= 0:
            return key, f"{key}={_get(config, key)} is not positive.", f"set {key} above 0"
    if not 0 <= config.rollout.min_p <= 1:
        key = "rollout.min_p"
        return key, f"{key}={config.rollout.min_p} is no probability.", f"set {key} from 0 to 1"
    if not 0 < config.rollout.top_p <= 1:
        key = "rollout.top_p"
        return key, f"{key}={config.rollout.top_p} is no probability.", f"set {key} above 0 and up to 1"
    return None


def _check_train_layout(config: Config) -> Fault:
    workers, train = config.cluster.workers, config.train
    tensor, pipeline, expert = train.tensor_parallel, train.pipeline_parallel, train.expert_parallel
    if workers % (tensor * pipeline):
        key = "train.tensor_parallel" if tensor > 1 else "train.pipeline_parallel"
        problem = f"train.tensor_parallel={tensor} x train.pipeline_parallel={pipeline} does not divide"
        return key, f"{problem} cluster.workers={workers}.", f"set cluster.workers to a multiple of {tensor * pipeline}"
    if train.expert_tensor_parallel not in (1, tensor):
        key = "train.expert_tensor_parallel"
        problem = f"{key}={train.expert_tensor_parallel} is neither 1 nor train.tensor_parallel={tensor}."
        return key, problem, f"set {key} to {' or '.join(str(size) for size in sorted({1, tensor}))}"
    ranks_per_stage = workers // pipeline
    if ranks_per_stage % (expert * train.expert_tensor_parallel):
        key = "train.expert_parallel"
        problem = f"{key}={expert} x train.expert_tensor_parallel={train.expert_tensor_parallel} does not divide"
        fix = f"set {key} to a divisor of {ranks_per_stage // train.expert_tensor_parallel}"
        return key, f"{problem} the {ranks_per_stage} ranks of a pipeline stage.", fix
    for key, default in (("train.recompute_method", "uniform"), ("train.recompute_layers", 1)):
        if train.recompute != "full" and _get(config, key) != default:
            problem = f"{key}={_get(config, key)}, but train.recompute={train.recompute} does not ask for it."
            return key, problem, f"set train.recompute to full, or leave {key} out"
    if train.layers_per_stage and not re.fullmatch(r"[1-9]\d*(, *[1-9]\d*)*", train.layers_per_stage):
        key = "train.layers_per_stage"
        fix = f"write {pipeline} numbers above 0 with commas between them, those of the model's layers together"
        return key, f"{key}={train.layers_per_stage} are no numbers of layers.", fix
    if train.layers_per_stage and len(train.stage_layers) != pipeline:
        key = "train.layers_per_stage"
        problem = f"{key}={train.layers_per_stage} are {len(train.stage_layers)} stages, train.pipeline_parallel is"
        return key, f"{problem} {pipeline}.", f"set train.pipeline_parallel to {len(train.stage_layers)}"
    if tensor > 1 and not train.sequence_parallel:
        key = "train.sequence_parallel"
        problem = f"train.tensor_parallel={tensor} without sequence parallelism: Megatron trains no MoE that way."
        return key, problem, f"set {key} to true"
    return None


def _check_rollout_layout(config: Config) -> Fault:
    workers, rollout = config.cluster.workers, config.rollout
    if not config.has_rollout_engine or rollout.tensor_parallel * rollout.data_parallel == workers:
        return None
    key = "rollout.data_parallel"
    problem = f"rollout.tensor_parallel={rollout.tensor_parallel} x {key}={rollout.data_parallel} is not"
    if workers % rollout.tensor_parallel:
        return key, f"{problem} cluster.workers={workers}.", f"set rollout.tensor_parallel to a divisor of {workers}"
    return key, f"{problem} cluster.workers={workers}.", f"set {key} to {workers // rollout.tensor_parallel}"


def _check_rollouts(config: Config) -> Fault:
    """What a step's samples may come from."""
    algorithm, rollout, correction = config.algorithm, config.rollout, config.rollout_correction
    off = {
        "rollout.carry_prompts": (rollout.carry_prompts, "0"),
        "rollout.ahead": (rollout.ahead, "false"),
        "rollout_correction.rollout_is": (correction.rollout_is != "none", "none"),
        "rollout_correction.rollout_rs": (correction.rollout_rs != "none", "none"),
        "rollout_correction.rollout_token_veto_threshold": (correction.rollout_token_veto_threshold, "0"),
        "rollout_correction.bypass_mode": (correction.bypass_mode, "false"),
        "router_replay.mode": (config.router_replay.is_on, "disabled"),
    }
    reasons = {"dapo": "samples until it has enough", "dpo": "learns from pairs, without a rollout"}
    reason, keys = reasons.get(algorithm.name), list(off) if algorithm.name == "dpo" else list(off)[:2]
    for key in keys:
        given, neutral = off[key]
        if given and reason:
            problem = f"{key}={_shown(_get(config, key))}, but algorithm.name={algorithm.name} {reason}."
            return key, problem, f"set {key} to {neutral}, or algorithm.name to grpo"
    key, carried = "rollout.carry_prompts", rollout.carry_prompts
    if carried and rollout.ahead:
        return "rollout.ahead", f"rollout.ahead=true and {key}={carried} exclude each other.", f"set {key} to 0"
    if carried > algorithm.prompts_per_step:
        problem = f"{key}={carried} is more than algorithm.prompts_per_step={algorithm.prompts_per_step}: a step could"
        fix = f"set {key} to {algorithm.prompts_per_step} or less"
        return key, f"{problem} not learn from all that is due.", fix
    if carried and algorithm.prompts_per_step % rollout.data_parallel:
        problem = f"algorithm.prompts_per_step={algorithm.prompts_per_step} does not divide over"
        problem = f"{problem} rollout.data_parallel={rollout.data_parallel} engines, as {key} needs it."
        fix = f"set algorithm.prompts_per_step to a multiple of {rollout.data_parallel}, or {key} to 0"
        return "algorithm.prompts_per_step", problem, fix
    return None


def _check_correction(config: Config) -> Fault:
    return correction_fault(config.rollout_correction, config.algorithm.loss)


def _check_noise(config: Config) -> Fault:
    key, carried, bypass = "noise.log_probs", config.rollout.carry_prompts, config.rollout_correction.bypass_mode
    if not config.noise.enabled or config.noise.log_probs == "clean" or not (carried or bypass):
        return None
    why = f"tokens that rollout.carry_prompts={carried} carries over have the noise of several steps"
    if bypass:
        why = "with rollout_correction.bypass_mode=true the trainer takes no old log-probs"
    return key, f"{key}=noisy, but {why}.", f"set {key} to clean"


def _check_swap(config: Config) -> Fault:
    """What leaves memory at a swap, where there is none."""
    key = "swap.release_weights"
    if config.swap.release_weights and config.rollout.ahead:
        return key, f"{key}=true, but rollout.ahead=true keeps both engines at work.", f"set {key} to false"
    return None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_batches(config: Config) -> Fault:
    algorithm = config.algorithm
    key = "algorithm.prompts_per_mini_batch"
    if algorithm.prompts_per_step % algorithm.prompts_per_mini_batch:
        problem = f"{key}={algorithm.prompts_per_mini_batch} does not divide"
        fix = f"set {key} to a divisor of {algorithm.prompts_per_step}"
        return key, f"{problem} algorithm.prompts_per_step={algorithm.prompts_per_step}.", fix
    if config.algorithm.name == "dpo" and algorithm.prompts_per_mini_batch % config.train_data_parallel:
        problem = f"{key}={algorithm.prompts_per_mini_batch} pairs do not divide over"
        fix = f"set {key} to a multiple of {config.train_data_parallel}"
        return key, f"{problem} {config.train_data_parallel} data-parallel ranks.", fix
    if config.samples_per_mini_batch % config.train_data_parallel:
        problem = f"{config.samples_per_mini_batch} samples a mini-batch ({key} x algorithm.samples_per_prompt) do not"
        fix = f"set {key} to a multiple of {config.train_data_parallel}"
        return key, f"{problem} divide over {config.train_data_parallel} data-parallel ranks.", fix
    return None


def _check_algorithm(config: Config) -> Fault:
    algorithm, longest = config.algorithm, config.rollout.max_response_tokens
    if algorithm.kl_estimator not in KL_ESTIMATORS:
        key = "algorithm.kl_estimator"
        problem, near = f"{key}={algorithm.kl_estimator} is unknown.", " or ".join(KL_ESTIMATORS)
        if algorithm.kl_estimator == "full":
            problem = f"{key}=full needs both policies' probabilities of the whole vocabulary; the trainer keeps those"
            problem, near = f"{problem} of the sampled tokens only.", "k3 (low variance) or k2"
        return key, problem, f"set {key} to {near}"
    if algorithm.sampling_rounds > 1 and algorithm.name != "dapo":
        key = "algorithm.sampling_rounds"
        problem = f"{key}={algorithm.sampling_rounds}, but algorithm.name={algorithm.name} samples once a step."
        return key, problem, f"set algorithm.name to dapo, or {key} to 1"
    if algorithm.discount > 1:
        key = "algorithm.discount"
        return key, f"{key}={algorithm.discount} makes late rewards count more.", f"set {key} to 1 or less"
    if algorithm.dual_clip <= 1 + algorithm.clip_high:
        key = "algorithm.dual_clip"
        problem = f"{key}={algorithm.dual_clip} is not above 1 + algorithm.clip_high={algorithm.clip_high}."
        return key, problem, f"set {key} to 3"
    if algorithm.kl_target and not algorithm.kl_coefficient:
        key = "algorithm.kl_coefficient"
        return key, f"algorithm.kl_target={algorithm.kl_target} has no {key} to steer.", f"set {key} above 0"
    if algorithm.overlong_buffer_tokens > longest:
        key = "algorithm.overlong_buffer_tokens"
        problem = f"{key}={algorithm.overlong_buffer_tokens} is more than rollout.max_response_tokens={longest}."
        return key, problem, f"set {key} to {longest} or less"
    return None


def _check_critic(config: Config) -> Fault:
    """What goes with a critic, and what without."""
    algorithm, ppo = config.algorithm, config.algorithm.name == "ppo"
    key = "algorithm.advantage"
    if ppo and algorithm.advantage != "gae":
        problem = f"algorithm.name=ppo takes its advantages from a critic, not from {key}={algorithm.advantage}."
        return key, problem, f"set {key} to gae"
    if not ppo and algorithm.advantage == "gae":
        problem = f"{key}=gae needs a critic, and algorithm.name={algorithm.name} has none."
        return key, problem, f"set algorithm.name to ppo, or {key} to grpo"
    key = "algorithm.gae_lambda"
    if not 0 <= algorithm.gae_lambda <= 1:
        return key, f"{key}={algorithm.gae_lambda} is no share.", f"set {key} to 0 or more, and 1 or less"
    key = "algorithm.samples_per_prompt"
    if algorithm.samples_per_prompt < 2 and not ppo:
        problem = f"{key}={algorithm.samples_per_prompt} is too small: a sample is compared with its group."
        return key, problem, f"set {key} to 2 or more, or algorithm.name to ppo"
    return None


def _check_turns(config: Config) -> Fault:
    """Models that take turns on the cards, and loops that leave them no turn."""
    judged = config.reward_model.on_the_cards
    if judged and config.algorithm.name == "dpo":
        key = "reward_model.path"
        return key, f"{key}={config.reward_model.path}: algorithm.name=dpo has no rewards.", f"leave {key} empty"
    if judged and config.algorithm.sampling_rounds > 1:
        key = "reward_model.backend"
        problem = (
            f"{key}=megatron judges after the rollout, algorithm.sampling_rounds={config.algorithm.sampling_rounds}"
        )
        return key, f"{problem} asks for rewards during it.", f"set {key} to hf, or algorithm.sampling_rounds to 1"
    if config.rollout.ahead and (judged or config.algorithm.name == "ppo"):
        key, who = "rollout.ahead", "the reward model" if judged else "the critic"
        return key, f"{key}=true keeps both engines at work: {who} has no turn on the card.", f"set {key} to false"
    return None


def _check_dpo(config: Config) -> Fault:
    algorithm, key = config.algorithm, "dpo.flip_probability"
    if config.dpo.flip_probability >= 0.5:
        problem = f"{key}={config.dpo.flip_probability} takes most labels to be wrong."
        return key, problem, f"set {key} below 0.5, or exchange data.chosen_field and data.rejected_field"
    if algorithm.name != "dpo":
        return None
    if algorithm.samples_per_prompt != 2:
        key = "algorithm.samples_per_prompt"
        problem = f"{key}={algorithm.samples_per_prompt}, but a prompt of dpo has a chosen and a rejected response."
        return key, problem, f"set {key} to 2"
    if config.rollout.temperature != 1:
        key = "rollout.temperature"
        problem = f"{key}={config.rollout.temperature} would sharpen or flatten the log-probs that dpo compares."
        return key, problem, f"set {key} to 1 (eval.temperature is that of evaluations)"
    if algorithm.kl_coefficient:
        key = "algorithm.kl_coefficient"
        problem = f"{key}={algorithm.kl_coefficient} has no place in dpo, whose loss holds the KL."
        return key, problem, f"set {key} to 0, and dpo.beta higher to stay closer to the reference"
    if config.noise.enabled:
        return "noise.enabled", "noise.enabled=true, but dpo samples nothing.", "set noise.enabled to false"
    return None


def _check_full_training(config: Config) -> Fault:
    """What lora.rank=0 leaves without a purpose, and what only it gives one."""
    quant, lora, size = config.quant, config.lora, "quant.group_size"
    if quant.group_size and (lora.rank or quant.format == "none"):
        reason = "quant.format=none has no scales" if lora.rank == 0 else "the checkpoint says which groups it has"
        return size, f"{size}={quant.group_size}, but {reason}.", f"set {size} to 0"
    if lora.rank:
        return None
    for key, default in (("lora.in_rollout", "auto"), ("lora.merge_rounding", "stochastic")):
        if _get(config, key) != default:
            problem = f"{key}={_get(config, key)}, but lora.rank=0 has no adapters: trained weights are rounded to"
            return key, f"{problem} nearest.", f"set {key} to {default}, or lora.rank above 0"
    return None


def _check_adapters(config: Config) -> Fault:
    if config.lora.rank == 0:
        return None
    if not (config.lora.attention or config.lora.experts):
        problem = "lora.attention and lora.experts are both false: nothing would train."
        return "lora.attention", problem, "set one of them to true"
    key, rounding = "lora.in_rollout", "lora.merge_rounding"
    if config.lora.experts and config.lora.in_rollout == "adapter" and config.quant.format != "w8a8":
        problem = f"{key}=adapter: the engine runs expert adapters beside int8 experts only, and quant.format is"
        fix = f"set {key} to auto or merge, or lora.experts to false"
        return key, f"{problem} {config.quant.format}.", fix
    if config.lora.in_rollout == "adapter" and config.lora.merge_rounding == "nearest":
        problem = f"{rounding}=nearest, but {key}=adapter rounds nothing."
        return rounding, problem, f"set {rounding} to stochastic, or {key} to merge"
    return None


def _check_lengths(config: Config) -> Fault:
    rollout, key = config.rollout, "model.max_length"
    needed = rollout.max_prompt_tokens + rollout.max_response_tokens
    if needed > config.model.max_length:
        sizes = f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} + max_response_tokens"
        problem = f"{sizes}={rollout.max_response_tokens} exceed {key}={config.model.max_length}."
        return key, problem, f"set {key} to {needed} or more"
    longest, key = config.model.max_length, "rollout.max_batched_tokens"
    if rollout.max_batched_tokens < longest and not rollout.chunked_prefill:
        problem = f"{key}={rollout.max_batched_tokens} is less than model.max_length={longest}:"
        fix = f"set {key} to {longest} or more, or rollout.chunked_prefill to true"
        return key, f"{problem} no prompt is prefilled in parts.", fix
    if config.has_rollout_engine and rollout.max_batched_tokens < rollout.max_sequences:
        problem = f"{key}={rollout.max_batched_tokens} is less than rollout.max_sequences={rollout.max_sequences}:"
        return (
            key,
            f"{problem} not every sequence gets a token a step.",
            f"set {key} to {rollout.max_sequences} or more",
        )
    return None


def _check_paths(config: Config) -> Fault:
    if not config.model.path:
        fix = "set model.path to a model folder (python -m qerl_rl make-model writes one)"
        return "model.path", "model.path is empty.", fix
    if not config.data.train_path:
        return "data.train_path", "data.train_path is empty.", "set data.train_path to a .jsonl file, or to arithmetic"
    if not re.fullmatch(r"[\w.\-]+", config.run.name):
        return "run.name", f"run.name={config.run.name!r} can't name files.", "use letters, digits, _ . - in run.name"
    return None


def _check_reward(config: Config) -> Fault:
    reward, key = config.reward, "reward.functions"
    if reward.function and reward.functions:
        problem = f"reward.function={reward.function} and {key} are both set."
        return key, problem, f"move {reward.function} into {key} with a weight, and leave reward.function empty"
    for name, weight in reward.functions.items():
        if not math.isfinite(weight):
            return key, f"{key}.{name}={weight} is no weight.", f"set {key}.{name} to a finite number"
    model = config.reward_model
    if not math.isfinite(model.weight):
        return "reward_model.weight", f"reward_model.weight={model.weight} is no weight.", "set it to a finite number"
    if not any(reward.weights.values()) and not (model.path and model.weight):
        fix = "set one of them to another number, or give a reward model (reward_model.path, weight)"
        return key, f"every weight in {key} is 0: all samples would earn the same.", fix
    return None


def _check_data(config: Config) -> Fault:
    key, kept, most = "data.max_prompt_tokens", config.data.max_prompt_tokens, config.rollout.max_prompt_tokens
    if kept <= most:
        return None
    return key, f"{key}={kept} exceeds rollout.max_prompt_tokens={most}.", f"set {key} to {most} or less"


CHECKS = (
    _check_values,
    _check_train_layout,
    router_fault,
    mindspeed_fault,
    _check_rollout_layout,
    _check_rollouts,
    _check_correction,
    _check_noise,
    _check_swap,
    _check_batches,
    _check_algorithm,
    _check_critic,
    _check_turns,
    _check_dpo,
    _check_full_training,
    _check_adapters,
    _check_lengths,
    _check_paths,
    _check_reward,
    _check_data,
    profiler_fault,
)
