"""Checks of the models that take turns with the policy on its cards: a critic of its own, a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.fit import check_layout
from qerl_rl.layout.slots import SCORE
from qerl_rl.model.formats import check_checkpoint
from qerl_rl.quant.checkpoint import CheckpointReader, stored_format


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder. Raises: ConfigError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the tokenizer in {folder} can't be loaded: {reason}",
            fix="put the tokenizer's files beside config.json",
            where=folder,
        ) from None


def check_value_models(loaded: LoadedConfig, policy: MoeArchitecture, tokenizer: Any) -> None:
    """The folders of critic and reward model must hold what reads the policy's tokens in the policy's layout.

    Args: policy, tokenizer: the policy's. Raises: ConfigError for the first that can't be used.
    """
    config = loaded.config
    if config.algorithm.name == "ppo" and config.critic.path:
        _check_model(loaded, "critic.path", config.critic.path, policy, tokenizer)
        _check_critic_trains(loaded)
    if config.reward_model.on_the_cards:
        key, path = "reward_model.path", config.reward_model.path
        own = _check_model(loaded, key, path, policy, tokenizer)
        _check_score(loaded, key, path, own)
        _check_length(loaded, own)


def _check_critic_trains(loaded: LoadedConfig) -> None:
    config = loaded.config
    found = stored_format(config.critic.path)
    if config.lora.rank == 0 and found != "none":
        raise ConfigError(
            f"critic.path={config.critic.path} holds {found}, but with lora.rank=0 all weights of the critic train.",
            fix="set critic.path to a checkpoint in bfloat16 or float32, or lora.rank above 0",
            where=loaded.locate("critic.path"),
        )


def _check_model(loaded: LoadedConfig, key: str, path: str, policy: MoeArchitecture, tokenizer: Any) -> MoeArchitecture:
    where = loaded.locate(key)
    if not Path(path, "config.json").is_file():
        raise ConfigError(f"{key}={path} holds no config.json.", fix=f"set {key} to a model folder", where=where)
    own = MoeArchitecture.from_folder(path)
    check_layout(own, loaded.config.train)
    check_checkpoint(path, own, loaded.config.train)
    # Text never passes between the models, token ids do: what each id stands for must be the same.
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab() or own.vocabulary_size < policy.vocabulary_size:
        problem = f"{key}={path} has another tokenizer than model.path={loaded.config.model.path}."
        fix = f"set {key} to a model that was made from the policy's family with its tokenizer"
        if key == "reward_model.path":
            fix += ", or reward_model.backend to hf"
        raise ConfigError(problem, fix=fix, where=where)
    return own


def _check_score(loaded: LoadedConfig, key: str, path: str, own: MoeArchitecture) -> None:
    with CheckpointReader(path) as reader:
        found = reader.shape(SCORE) if SCORE in reader else None
    if found != (1, own.hidden_size):
        has = f"no {SCORE}" if found is None else f"{SCORE} of shape {list(found)}"
        raise ConfigError(
            f"{key}={path} has {has}: it does not score responses.",
            fix=f"set {key} to a sequence classification model with num_labels=1",
            where=loaded.locate(key),
        )


def _check_length(loaded: LoadedConfig, own: MoeArchitecture) -> None:
    rollout, key = loaded.config.rollout, "reward_model.max_length"
    needed = rollout.max_prompt_tokens + rollout.max_response_tokens
    limit = min(loaded.config.reward_model.max_length or own.max_positions, own.max_positions)
    if limit < needed:
        raise ConfigError(
            f"the reward model reads {limit} tokens and cuts none off; prompt and response may have {needed}.",
            fix=f"set {key} to 0, or shorten rollout.max_prompt_tokens + max_response_tokens to {limit}",
            where=loaded.locate(key),
        )
