"""What travels between the stages of a step, and who reads what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qerl_rl.config.schema import Config
from qerl_rl.layout.architecture import MoeArchitecture
from transfer_dock import TransferDock

COLUMNS = {
    "prompts": "int32",
    "partial_responses": "int32",
    "partial_log_probs": "float32",
    "ages": "int32",
    "left_responses": "int32",
    "left_log_probs": "float32",
    "partial_routed_experts": "uint8",
    "left_routed_experts": "uint8",
    "routed_experts": "uint8",
    "prompt_texts": "str",
    "answers": "str",
    "responses": "int32",
    "response_texts": "str",
    "rollout_log_probs": "float32",
    "truncated": "float32",
    "rewards": "float32",
    "model_scores": "float32",
    "selected": "float32",
    "old_log_probs": "float32",
    "reference_log_probs": "float32",
    "values": "float32",
    "returns": "float32",
    "advantages": "float32",
}
"""The type of every column that a loop may use; routed experts of more than 256 are int16."""

GRPO = {
    "rollout": ("prompts",),
    "reward": ("prompt_texts", "responses", "answers"),
    "log_probs": ("prompts", "responses", "rollout_log_probs"),
    "advantages": (
        *("prompts", "responses", "rewards", "truncated", "prompt_texts", "response_texts", "answers"),
        *("old_log_probs", "reference_log_probs"),
    ),
    "update": (
        *("prompts", "responses", "truncated", "rollout_log_probs"),
        *("old_log_probs", "reference_log_probs", "advantages"),
    ),
}
"""The stages of GRPO and the columns that each reads."""

DAPO = GRPO | {"selection": ("rewards",), "log_probs": (*GRPO["log_probs"], "selected")}
"""Those of DAPO: what comes after the selection sees the selected samples only, the others lack columns."""

DPO = {"reference_log_probs": ("prompts", "responses"), "update": ("prompts", "responses", "reference_log_probs")}
"""Those of DPO: a group is a pair, its sample 0 the chosen response and its sample 1 the rejected one."""


PPO = GRPO | {
    "values": ("prompts", "responses"),
    "advantages": (*GRPO["advantages"], "values"),
    "update_critic": ("prompts", "responses", "truncated", "values", "returns"),
}
"""Those of PPO, whose critic reads and learns beside the policy."""


def with_model_scores(stages: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The stages with a reward model on the cards among them, before the advantages."""
    return {
        **stages,
        "model_scores": ("prompts", "responses"),
        "advantages": (*stages["advantages"], "model_scores"),
    }


CARRIED = {
    "rollout": ("prompts", "partial_responses", "partial_log_probs", "ages"),
    "carry": ("prompts", "prompt_texts", "answers", "left_responses", "left_log_probs", "ages"),
}
"""More stages where samples are carried over. `ages` counts the steps that a sample was carried over before this one.
What a step leaves unfinished gets the columns left_*; as a sample of the next step it begins with partial_*."""


def with_routing(stages: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The stages with the policy's own passes on the experts that the rollout engine chose.

    A critic and a reward model are other models, and route by themselves.
    """
    read = {
        "rollout": "partial_routed_experts" if "carry" in stages else None,
        "carry": "left_routed_experts",
        "log_probs": "routed_experts",
        "update": "routed_experts",
    }
    return {stage: (*columns, column) if (column := read.get(stage)) else columns for stage, columns in stages.items()}


def without_reference(stages: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The stages where there is no reference, so that nobody writes its log-probs."""
    return {
        stage: tuple(column for column in columns if column != "reference_log_probs")
        for stage, columns in stages.items()
    }


def column_types(config: Config) -> dict[str, str]:
    """COLUMNS, with experts' numbers in a type that holds those of the model."""
    types = dict(COLUMNS)
    if config.router_replay.is_on and MoeArchitecture.from_folder(config.model.path).experts > 256:
        types |= {name: "int16" for name in types if name.endswith("routed_experts")}
    return types


def stages_of(config: Config, stages: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    """The stages of a loop, and what each reads, as the configuration has them."""
    if not config.has_reference:
        stages = without_reference(stages)
    if config.reward_model.on_the_cards:
        stages = with_model_scores(stages)
    if config.rollout.carry_prompts:
        stages = {**stages, **CARRIED}
    return with_routing(stages) if config.router_replay.is_on else stages


def create_dock(config: Config, stages: Mapping[str, Sequence[str]], restore: Path | None = None) -> TransferDock:
    """The dock of a run with these stages; its columns are what they read.

    Args: restore: a file with what was left in it when a checkpoint was written.
    """
    stages = stages_of(config, stages)
    read = {column for columns in stages.values() for column in columns}
    return TransferDock.create(
        columns={name: kind for name, kind in column_types(config).items() if name in read},
        consumers={stage: list(columns) for stage, columns in stages.items()},
        samples_per_group=config.algorithm.samples_per_prompt,
        capacity_bytes=config.dock.capacity_bytes,
        timeout=config.dock.timeout_s,
        lease_timeout=max(config.fault.rollout_timeout_s, config.fault.train_timeout_s),
        restore=None if restore is None else str(restore),
    )
