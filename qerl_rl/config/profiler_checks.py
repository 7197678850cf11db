"""What must hold of the profiler's keys."""

from __future__ import annotations

from qerl_rl.config.correction_checks import Fault
from qerl_rl.config.profiler_schema import ALL, STAGES
from qerl_rl.config.schema import Config


def profiler_fault(config: Config) -> Fault:
    """The first key that asks for what this run can't record."""
    profiler = config.profiler
    for key, numbers, least, most in (
        ("profiler.steps", profiler.steps, 1, config.run.steps),
        ("profiler.ranks", profiler.ranks, 0, config.cluster.workers - 1),
    ):
        for number in numbers:
            if not least <= number <= most:
                return key, f"{key} holds {number}: there is none.", f"set {key} to numbers from {least} to {most}"
    if not profiler.steps:
        return None
    if config.train.device == "npu-sim":
        problem = "profiler.steps asks for traces, and train.device=npu-sim has no driver that could write them."
        return "profiler.steps", problem, "set profiler.steps to [], or train.device to another"
    if profiler.kind == "msprof" and config.train.device in ("cpu", "cuda"):
        problem = f"profiler.kind=msprof profiles NPUs, and train.device={config.train.device}."
        return "profiler.kind", problem, "set profiler.kind to torch"
    key, missing = "profiler.stages", _missing_stages(config)
    for stage in profiler.stages:
        if stage not in (*STAGES, ALL):
            return key, f"{key} holds {stage}, which is unknown.", f"choose from {', '.join((*STAGES, ALL))}"
        if stage in missing:
            return key, f"{key} holds {stage}: this run has none ({missing[stage]}).", f"take {stage} out of {key}"
    if config.rollout.ahead and profiler.stages != ["rollout"] and {"rollout", ALL} & {*profiler.stages}:
        problem = f"{key} holds rollout and more: rollout.ahead runs them at the same time, and a process records one."
        return key, problem, f"set {key} to [rollout], or take rollout (or all) out of it"
    return None


def _missing_stages(config: Config) -> dict[str, str]:
    """The stages that the run does not have, and why."""
    name = config.algorithm.name
    reasons = {
        "rollout": name == "dpo" and "dpo samples nothing",
        "swap_to_rollout": not config.has_rollout_engine and "dpo without evaluations has one engine",
        "swap_to_train": (not config.has_rollout_engine and "dpo without evaluations has one engine")
        or (config.rollout.ahead and "with rollout.ahead both engines stay"),
        "old_log_probs": (name == "dpo" and "dpo compares with the reference only")
        or (config.rollout_correction.bypass_mode and "rollout_correction.bypass_mode takes the engine's"),
        "reference_log_probs": not config.has_reference and "no reference without adapters or KL",
        "values": name != "ppo" and "only ppo has a critic",
        "critic_update": name != "ppo" and "only ppo has a critic",
        "reward": not config.reward_model.on_the_cards and "no reward model with reward_model.backend=megatron",
    }
    return {stage: reason for stage, reason in reasons.items() if reason}
