"""Which checkpoint a run goes on from, and whether its launch file still describes the same run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from qerl_rl.config.schema import Config
from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.train import checkpoint

DOCK = "dock"
"""The file of a checkpoint with the samples that were still in the dock; missing when there were none."""

LAYOUT = ("cluster.workers", *(f"train.{name}_parallel" for name in ("tensor", "pipeline", "expert", "expert_tensor")))
"""Keys of the training layout: adapters and their optimizer are regrouped; where every weight trains (lora.rank=0) the
layout stays."""

FIXED = (
    *("run.seed", "algorithm.name", "critic.path", "rollout.carry_prompts", "rollout.ahead"),
    *("quant", "lora", "data"),
)
"""Keys, and whole sections, that make a run this run."""

WAITING = ("algorithm.prompts_per_step", "algorithm.samples_per_prompt", "rollout.max_response_tokens")
"""Keys that samples which wait in the dock were drawn for."""

FREE = ("run", "model.path", "cluster", "swap", "dock", "checkpoint", "eval", "track", "profiler", "fault")
"""Keys and sections that change nothing of what is computed (the model's content is compared instead of its path)."""


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint and what is to be said about going on from it.

    `folder` holds step folders; `state` is what the trainer put into the meta.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def dock(self) -> Path | None:
        """The dock's file, where there is one."""
        path = checkpoint.step_folder(self.folder, self.step) / DOCK
        return path if path.is_file() else None


def find_resume(loaded: LoadedConfig, choice: str) -> ResumePoint | None:
    """The checkpoint that `choice` (auto, never or a path) names; None for a fresh start.

    auto takes the newest complete one of run.output_dir. A path is a run's folder, its checkpoints, or one of them.
    Raises: ConfigError when the path holds none, or when a key changed that must not.
    """
    if choice == "never":
        return None
    config = loaded.config
    if choice == "auto":
        folder, step = checkpoints_of(config), None
        if not checkpoint.complete_steps(folder):
            return None
    else:
        folder, step = _named(Path(choice))
    meta = checkpoint.read_meta(folder, step)
    if "run" not in meta:
        raise ConfigError(
            f"the checkpoint of step {meta['step']} in {folder} was not written by launch.py.",
            fix="give the checkpoint of a run",
        )
    state = meta["run"]
    point = ResumePoint(folder, meta["step"], state, tuple(_remarks(config, state["config"])))
    _check_same_run(loaded, state, folder, waits=point.dock is not None)
    if meta["step"] > config.run.steps:
        raise ConfigError(
            f"the checkpoint is of step {meta['step']}, beyond run.steps={config.run.steps}.",
            fix=f"set run.steps to {meta['step']} or more",
            where=loaded.locate("run.steps"),
        )
    return point


def checkpoints_of(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(config.run.output_dir) / "checkpoints"


def run_state(
    config: Config, *, model: str, prompts: dict[str, int], prompts_needed: int, algorithm: dict[str, Any]
) -> dict[str, Any]:
    """What the trainer keeps in a checkpoint: the launch file, the model's identity, the place in the data.

    Args: model: the fingerprint of its folder. prompts: the state of the prompt source. prompts_needed: how many
    prompts were drawn where data is generated. algorithm: what its loop has to know.
    """
    return {
        "config": dataclasses.asdict(config),
        "model": model,
        "prompts": prompts,
        "prompts_needed": prompts_needed,
        "algorithm": algorithm,
    }


def _named(path: Path) -> tuple[Path, int | None]:
    step = checkpoint.step_of(path)
    if step is not None and checkpoint.is_complete(path):
        return path.parent, step
    for folder in (path / "checkpoints", path):
        if checkpoint.complete_steps(folder):
            return folder, None
    raise ConfigError(
        f"--resume {path}: there is no complete checkpoint.",
        fix="give the folder of a run, its checkpoints folder or one of its step folders, or auto",
    )


def _changed(config: Config, written: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys with another value now: (then, now). A key that either side does not know is left out."""
    now = dataclasses.asdict(config)
    return {
        f"{section}.{key}": (written[section][key], value)
        for section, values in now.items()
        for key, value in values.items()
        if key in written.get(section, {}) and written[section][key] != value
    }


def _is_in(key: str, group: tuple[str, ...]) -> bool:
    return key in group or key.partition(".")[0] in group


def _check_same_run(loaded: LoadedConfig, state: dict[str, Any], folder: Path, *, waits: bool) -> None:
    config = loaded.config
    elsewhere = "or start anew in another run.output_dir"
    of_full_training = (*LAYOUT, "train.dtype") if config.lora.rank == 0 else ()
    fixed = (*FIXED, *(WAITING if waits else ()), *of_full_training)
    for key, (then, now) in _changed(config, state["config"]).items():
        if _is_in(key, fixed):
            raise ConfigError(
                f"{key}={now}, but the checkpoint in {folder} was made with {then}.",
                fix=f"set {key} back to {then}, {elsewhere}",
                where=loaded.locate(key),
            )
    then, now = _held_out(state["config"]), _held_out(dataclasses.asdict(config))
    if then != now:
        raise ConfigError(
            f"the eval section takes {now} prompts out of the training data, {then} when the checkpoint was made.",
            fix=f"set eval.every, eval.path and eval.prompts back, {elsewhere}",
            where=loaded.locate("eval.prompts"),
        )
    if fingerprint(config.model.path) != state["model"]:
        raise ConfigError(
            f"model.path={config.model.path} is not the model that the checkpoint in {folder} was made with.",
            fix=f"set model.path back to that model ({state['config']['model']['path']} then), {elsewhere}",
            where=loaded.locate("model.path"),
        )


def _held_out(values: dict[str, Any]) -> int:
    evaluation = values["eval"]
    return evaluation["prompts"] if evaluation["every"] and not evaluation["path"] else 0


def _remarks(config: Config, written: dict[str, Any]) -> list[str]:
    """What will not be as in a run without interruption."""
    changed, remarks = _changed(config, written), []
    layout = [f"{key} {then} -> {now}" for key, (then, now) in changed.items() if key in LAYOUT]
    if layout:
        remarks.append(
            f"another train layout ({', '.join(layout)}): weights and optimizer are the same, the random states differ "
            "(each rank starts its own anew)"
        )
    if "run.steps" in changed and config.noise.enabled:
        then, now = changed["run.steps"]
        remarks.append(f"run.steps {then} -> {now}: the stages of the noise are parts of run.steps, so they move")
    other = [key for key in changed if key not in LAYOUT and not _is_in(key, FREE)]
    if other:
        values = ", ".join(f"{key} {changed[key][0]} -> {changed[key][1]}" for key in other)
        remarks.append(f"from here on other settings hold: {values}")
    return remarks
