"""Everything that can be checked before a process starts: keys, model folder, layouts, data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_rl.algorithms.choices import find_advantage, find_loss
from qerl_rl.algorithms.ppo import GAE
from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig, to_yaml
from qerl_rl.config.schema import Config
from qerl_rl.data.pairs import load_pairs
from qerl_rl.data.prompts import Prompt, PromptSet, held_out, load_prompts
from qerl_rl.data.source import PromptSource
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.fit import check_layout
from qerl_rl.model.formats import check_checkpoint, check_rounding
from qerl_rl.platform.determinism import contradiction
from qerl_rl.quant.checkpoint import stored_format
from qerl_rl.quant.quantize import recipe_of
from qerl_rl.reshard.moved import moved_tensors, target_layout
from qerl_rl.rewards import load_rewards
from qerl_rl.rewards.model import check_reward_model
from qerl_rl.rollout.limits import check_expert_sizes, check_kv_cache, check_latent_width
from trainer.ascend import check_ascend, is_for_npu
from trainer.resume import ResumePoint, find_resume
from trainer.simulation import prepare_simulation
from trainer.value_models import check_value_models, load_tokenizer


@dataclass
class Plan:
    """A launch that can run: the configuration, the model's shape, the prompts and the tokenizer."""

    config: Config
    architecture: MoeArchitecture
    tokenizer: Any
    prompts: PromptSource
    eval_prompts: list[Prompt]
    left_out: int
    """Prompts, of training and evaluation, that data.max_prompt_tokens keeps away."""
    prompts_needed: int
    """How many prompts were drawn where the data is generated."""
    resume: ResumePoint | None = None
    """Where the run goes on from; None for a fresh start."""
    resume_asked: str = "never"
    """What --resume said."""
    has_weights: bool = True
    """Whether the model folder has weights, whose formats were checked; a dry run does without."""

    @property
    def first_step(self) -> int:
        """The first step to run, counted from 1."""
        return self.resume.step + 1 if self.resume else 1


def preflight(loaded: LoadedConfig, resume: str = "never", *, dry_run: bool = False) -> Plan:
    """Check the launch file against itself, the model, the data and the checkpoint that `resume` names, if any.

    Args: resume: auto, never or a path, as `find_resume` takes it. dry_run: a folder with a model's config.json and
        tokenizer alone will do.
    Raises: ConfigError with the fix for the first thing that can't work.
    """
    config = loaded.config
    check_config(config, loaded.locate)
    _check_determinism(loaded)
    prepare_simulation(loaded, dry_run=dry_run)
    if not Path(config.model.path, "config.json").is_file():
        raise ConfigError(
            f"model.path={config.model.path} holds no config.json.",
            fix="set model.path to a model folder (python -m qerl_rl make-model writes one)",
            where=loaded.locate("model.path"),
        )
    architecture = MoeArchitecture.from_folder(config.model.path)
    has_weights = not dry_run or any(Path(config.model.path).glob("*.safetensors"))
    if has_weights:
        _check_format(loaded)
    _check_model_layouts(loaded, architecture, has_weights)
    check_ascend(loaded, architecture, has_weights)
    load_rewards(config.reward)
    _check_reward_model(loaded)
    _check_functions(loaded)
    tokenizer = load_tokenizer(config.model.path)
    check_value_models(loaded, architecture, tokenizer)
    point = find_resume(loaded, resume)
    needed = point.state["prompts_needed"] if point else prompts_needed(config)
    train, evaluation, left_out = _load_data(loaded, tokenizer, needed)
    if point:
        train.load_state(point.state["prompts"])
    return Plan(config, architecture, tokenizer, train, evaluation, left_out, needed, point, resume, has_weights)


def _check_format(loaded: LoadedConfig) -> None:
    config = loaded.config
    found = stored_format(config.model.path)
    if config.lora.rank == 0:
        if found != "none":
            raise ConfigError(
                f"lora.rank=0 trains every weight, but {config.model.path} holds {found}, which does not train.",
                fix="set model.path to the checkpoint in bfloat16 or float32, or lora.rank above 0",
                where=loaded.locate("lora.rank"),
            )
    elif found != config.quant.format:
        raise ConfigError(
            f"quant.format={config.quant.format}, but {config.model.path} holds {found}.",
            fix=f"set quant.format to {found}, or quantize the model",
            where=loaded.locate("quant.format"),
        )


def _check_determinism(loaded: LoadedConfig) -> None:
    """The environment that the launch file gives its workers must not undo run.deterministic."""
    config = loaded.config
    found = contradiction(config.train.device, config.cluster.environment) if config.run.deterministic else None
    if found:
        name, value = found
        raise ConfigError(
            f"run.deterministic=true, but cluster.environment.{name}={config.cluster.environment[name]}.",
            fix=f"take {name} out of cluster.environment (it becomes {value}), or set run.deterministic to false",
            where=loaded.locate(f"cluster.environment.{name}"),
        )


def _check_functions(loaded: LoadedConfig) -> None:
    """The advantages and the loss that the launch file names must exist and take what they are called with."""
    algorithm = loaded.config.algorithm
    finders: dict[str, Callable[[], object]] = {
        "algorithm.loss": lambda: find_loss(algorithm.loss),
    }
    if algorithm.advantage != GAE:
        finders["algorithm.advantage"] = lambda: find_advantage(algorithm.advantage)
    for key, find in finders.items():
        try:
            find()
        except ConfigError as error:
            raise ConfigError(error.problem, fix=error.fix, where=error.where or loaded.locate(key)) from None


def _check_reward_model(loaded: LoadedConfig) -> None:
    model = loaded.config.reward_model
    if not model.path or model.backend != "hf":
        return
    try:
        check_reward_model(model.path)
    except ConfigError as error:
        raise ConfigError(error.problem, fix=error.fix, where=loaded.locate("reward_model.path")) from None
    load_tokenizer(model.path)


def _check_model_layouts(loaded: LoadedConfig, architecture: MoeArchitecture, has_weights: bool) -> None:
    """Both engines' parallel sizes must fit the model."""
    config, rollout = loaded.config, loaded.config.rollout
    try:
        check_layout(architecture, config.train)
        if has_weights:
            check_checkpoint(config.model.path, architecture, config.train)
        if config.lora.rank == 0 and config.has_rollout_engine:
            check_rounding(architecture, recipe_of(config.quant), config.train)
        if config.has_rollout_engine:
            on_npu = is_for_npu(config)
            if not on_npu:
                check_expert_sizes(config.model.path, rollout)
            if config.train.device in ("cpu", "npu-sim"):
                check_latent_width(config.model.path)
            check_kv_cache(rollout, on_npu=on_npu)
            target_layout(config, architecture, moved_tensors(config, architecture))
    except ConfigError as error:
        # What these check is known without a launch file; here the line of the key can be added.
        named = re.search(r"\b[a-z]+\.[a-z_]+(?==)", error.problem)
        where = loaded.locate(named[0]) if named else error.where
        raise ConfigError(error.problem, fix=error.fix, where=where) from None
    if not config.has_rollout_engine:
        return
    splits = [
        ("rollout.tensor_parallel", rollout.tensor_parallel, architecture.attention_heads, "attention heads"),
        ("rollout.expert_parallel", rollout_expert_ranks(config), architecture.experts, "experts"),
    ]
    for key, size, whole, what in splits:
        if whole % size:
            divisors = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
            raise ConfigError(
                f"{key} splits over {size} ranks, which does not divide the model's {whole} {what}.",
                fix=f"choose a size out of {divisors}",
                where=loaded.locate(key),
            )


def prompts_needed(config: Config) -> int:
    """Different prompts that a whole run can use."""
    evaluation, algorithm = config.eval.prompts if config.eval.every else 0, config.algorithm
    trained = config.run.steps * algorithm.prompts_per_step * algorithm.sampling_rounds
    return trained + config.rollout.carry_prompts + evaluation


def _load_data(loaded: LoadedConfig, tokenizer: Any, needed: int) -> tuple[PromptSource, list[Prompt], int]:
    config = loaded.config

    def load(eval_path: str) -> PromptSet:
        return load_prompts(
            config.data,
            tokenizer,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            seed=config.run.seed,
            count_needed=needed,
            eval_path=eval_path,
            eval_split=config.eval.split,
        )

    def load_training_data() -> PromptSet:
        if config.algorithm.name != "dpo":
            return load("")
        return load_pairs(
            config.data,
            tokenizer,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_response_tokens=config.rollout.max_response_tokens,
            seed=config.run.seed,
            count_needed=needed,
        )

    loaded_train = load_training_data()
    prompts, left_out = loaded_train.prompts, loaded_train.left_out
    evaluation: list[Prompt] = []
    if config.eval.every and config.eval.path:
        held = load(config.eval.path)
        evaluation, left_out = held.prompts[: config.eval.prompts], left_out + held.left_out
    elif config.eval.every:
        prompts, evaluation = held_out(prompts, config.eval.prompts)
    if len(prompts) < config.algorithm.prompts_per_step:
        key = "algorithm.prompts_per_step"
        wanted = config.algorithm.prompts_per_step
        raise ConfigError(
            f"{config.data.train_path} has {len(prompts)} prompts, fewer than {key}={wanted}.",
            fix=f"set {key} to {len(prompts)} or less, or give more data",
            where=loaded.locate(key),
        )
    return PromptSource(prompts, seed=config.run.seed, shuffle=config.data.shuffle), evaluation, left_out


def describe_model(architecture: MoeArchitecture) -> str:
    """One line with the family and the sizes."""
    return (
        f"{architecture.family}, {architecture.layers} layers, hidden {architecture.hidden_size}, "
        f"{architecture.attention_heads} heads ({architecture.key_value_heads} key-value), "
        f"{architecture.experts} experts x {architecture.expert_width}, top {architecture.experts_per_token}, "
        f"vocabulary {architecture.vocabulary_size}"
    )


def describe(plan: Plan) -> str:
    """The resolved configuration and the derived sizes with their units, for --dry-run."""
    config, train, rollout = plan.config, plan.config.train, plan.config.rollout
    train_ranks = (
        f"tensor {train.tensor_parallel} x pipeline {train.pipeline_parallel} x data {config.train_data_parallel}"
    )
    experts = f"experts over {train.expert_parallel} x tensor {train.expert_tensor_parallel}"
    rollout_ranks = f"tensor {rollout.tensor_parallel} x data {rollout.data_parallel}"
    sizes = {
        "starts": f"after step {plan.resume.step} of {plan.resume.folder}" if plan.resume else "anew",
        "model": describe_model(plan.architecture),
        "weights": "read, of quant.format" if plan.has_weights else "none in model.path: not checked",
        "prompts to train on": f"{len(plan.prompts)} ({len(plan.eval_prompts)} held out)",
        "prompts left out": f"{plan.left_out} (longer than data.max_prompt_tokens={config.data.max_prompt_tokens})",
        "prompts a step": config.algorithm.prompts_per_step,
        "samples a step": config.samples_per_step,
        "samples a mini-batch": config.samples_per_mini_batch,
        "optimizer updates a step": config.mini_batches_per_step,
        "samples a rank and mini-batch": config.samples_per_rank_and_mini_batch,
        "tokens a micro-batch, at most": train.micro_batch_tokens,
        "train ranks": f"{config.cluster.workers} = {train_ranks}; {experts}",
    }
    if config.has_rollout_engine:
        sizes |= {
            "rollout ranks": f"{config.cluster.workers} = {rollout_ranks}; experts over {rollout_expert_ranks(config)}",
            "sequences decoded at once": rollout.max_sequences * rollout.data_parallel,
        }
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {value}" for name, value in sizes.items()]
    return "\n".join(["# resolved configuration", to_yaml(config), "# derived sizes", *lines])


def rollout_expert_ranks(config: Config) -> int:
    """Ranks that the experts of one rollout engine are split over; without expert parallelism each rank holds all."""
    rollout = config.rollout
    return rollout.tensor_parallel * rollout.data_parallel if rollout.expert_parallel else 1
