"""From a launch file of MindSpeed-RL to sections of ours, and what has to be said about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.mindspeed import sampling, surroundings, switches, training
from qerl_rl.config.mindspeed.draft import Draft
from qerl_rl.config.mindspeed.source import Source
from qerl_rl.config.mindspeed.tables import (
    ACTOR,
    ARCHITECTURE,
    DPO_RULES,
    NEUTRAL,
    NO_EFFECT,
    PPO_RULES,
    RL,
    RL_RULES,
    ROLES,
    SECTIONS,
    TRAIN_RULES,
    TRAINING,
    Rule,
)

STAGES = {"ray_grpo": "grpo", "ray_dapo": "dapo", "ray_ppo": "ppo", "dpo": "dpo", "ray_dpo": "dpo"}


@dataclass(frozen=True)
class Translation:
    """Sections of ours. origins: where each key of ours comes from, in their words. The rest is for the reader:

    differs: one sentence for each thing that is done in another way here. no_effect: keys that mean nothing here.
    architecture: keys that the model folder's config.json says instead.
    """

    values: dict[str, dict[str, Any]]
    origins: dict[str, str]
    differs: tuple[str, ...]
    no_effect: tuple[str, ...]
    architecture: tuple[str, ...]

    def describe(self) -> str:
        """What a reader of the plan has to know, in lines."""
        lines = ["# read from a launch file of MindSpeed-RL"]
        lines += [f"  done differently: {sentence}" for sentence in self.differs]
        for name, keys in (("has no effect here", self.no_effect), ("config.json says instead", self.architecture)):
            sections: dict[str, list[str]] = {}
            for section, _, key in (key.rpartition(".") for key in keys):
                sections.setdefault(section, []).append(key)
            lines += [f"  {name}: {section}.{{{', '.join(of)}}}" for section, of in sections.items()]
        return "\n".join(lines)


def is_mindspeed(tree: DictConfig) -> bool:
    """Whether a launch file has MindSpeed-RL's sections."""
    return TRAINING in tree or RL in tree


def is_theirs(override: str) -> bool:
    """Whether a command-line override names a key of MindSpeed-RL's."""
    section = override.partition("=")[0].partition(".")[0]
    return section in SECTIONS


def translate(path: Path, tree: DictConfig, overrides: Sequence[str]) -> Translation:
    """What the launch file at `path` means here.

    Args: tree: the file as OmegaConf read it. overrides: `section.key=value`, of theirs and of ours; ours settle what
        the file can't say.
    Raises: ConfigError for an unknown key, and one for all keys that can't be followed.
    """
    source = Source(path, tree, [override for override in overrides if is_theirs(override)])
    ours = {key: value for key, _, value in (item.partition("=") for item in overrides if not is_theirs(item))}
    draft = Draft(source, ours)
    _algorithm(draft)
    dpo = draft.value("algorithm.name") == "dpo"
    _apply(draft, (*TRAIN_RULES, *(DPO_RULES if dpo else RL_RULES)))
    if draft.value("algorithm.name") == "ppo":
        _apply(draft, PPO_RULES)
    training.cards(draft)
    training.batches(draft)
    training.schedule(draft)
    training.adapters(draft)
    for read in (switches.recomputation, switches.stages, switches.routers, switches.left_out):
        read(draft)
    if dpo:
        sampling.dpo_lengths(draft)
    else:
        training.objective(draft)
        sampling.engine(draft)
        sampling.partial_rollouts(draft)
        surroundings.rewards(draft)
    surroundings.model(draft)
    surroundings.data(draft)
    surroundings.environment(draft)
    surroundings.profiler(draft)
    _check_neutral(draft)
    _raise_faults(draft)
    surroundings.quantization(draft, _model_path(draft, ours))
    draft.values.setdefault("run", {})["name"] = path.stem
    return Translation(
        draft.values,
        draft.origins,
        tuple(dict.fromkeys(draft.differs)),
        tuple(_listed(draft, NO_EFFECT)),
        tuple(_listed(draft, {"role": ARCHITECTURE})),
    )


def _algorithm(draft: Draft) -> None:
    stage = draft.source.typed(ACTOR, "stage", str)
    if stage not in STAGES:
        name = draft.source.name_of(ACTOR, "stage") or f"{TRAINING}.stage"
        raise ConfigError(
            f"{name}={stage} names no algorithm.",
            fix=f"set {TRAINING}.stage to {', '.join(list(STAGES)[:-1])}",
            where=draft.source.where(name),
        )
    draft.put("algorithm.name", STAGES[stage], ACTOR, "stage")


def _apply(draft: Draft, rules: Sequence[Rule]) -> None:
    for rule in rules:
        written = draft.source.name_of(rule.section, rule.key) is not None
        value = draft.source.get(rule.section, rule.key, rule.default)
        if written or rule.default is not None:
            draft.put(rule.ours, rule.convert(value), rule.section, rule.key)


def _kind(section: str) -> str:
    return "role" if section in ROLES or section.startswith("model.") else section


def _check_neutral(draft: Draft) -> None:
    for section, key in draft.source.written():
        rule, value = NEUTRAL[_kind(section)].get(key), draft.source.get(section, key)
        # What a role's own section overrides does not count.
        if rule and value not in rule.allowed and not _is_overruled(draft, section, key):
            draft.fault(section, key, rule.fix, rule.instead)


def _is_overruled(draft: Draft, section: str, key: str) -> bool:
    return _kind(section) == "role" and draft.source.name_of(ACTOR, key) not in (None, f"{section}.{key}")


def _raise_faults(draft: Draft) -> None:
    if not draft.faults:
        return
    listed = "; ".join(f"({number}) {fault}" for number, fault in enumerate(draft.faults, start=1))
    raise ConfigError(
        f"this MindSpeed-RL launch file asks for what is not done here: {listed}.",
        fix="give each of these on the command line, as section.key=value, or in a copy of the file",
        where=str(draft.source.path),
    )


def _listed(draft: Draft, table: Mapping[str, str]) -> list[str]:
    names = [
        f"{section}.{key}" for section, key in draft.source.written() if key in table.get(_kind(section), "").split()
    ]
    return list(dict.fromkeys(names))


def _model_path(draft: Draft, ours: Mapping[str, str]) -> str:
    return ours.get("model.path", draft.value("model.path") or "")
