"""One run from start to end: Ray, the workers, the trainer, and an orderly end whatever happens."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import ray

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import ClusterConfig, Config
from qerl_rl.metrics.console import RunDisplay
from qerl_rl.train.checkpoint import complete_steps, tidy
from trainer.base import Trainer
from trainer.dapo import DapoTrainer
from trainer.dpo import DpoTrainer
from trainer.grpo import GrpoTrainer
from trainer.ppo import PpoTrainer
from trainer.preflight import Plan
from trainer.recorder import RunRecorder, own_peak_bytes
from trainer.resume import checkpoints_of
from transfer_dock import DockError
from workers import WorkerError, WorkerGroup

TRAINERS: dict[str, type[Trainer]] = {"grpo": GrpoTrainer, "dapo": DapoTrainer, "ppo": PpoTrainer, "dpo": DpoTrainer}
"""The loop of each algorithm.name."""


def run(plan: Plan) -> int:
    """Train; returns the exit code (0 done, 1 failed, 130 interrupted)."""
    config = plan.config
    display = RunDisplay(config.run.steps, config.samples_per_step, config.track.console, first_step=plan.first_step)
    if config.track.console != "quiet":
        for line in start_lines(plan):
            print(line, flush=True)
    tidy(checkpoints_of(config), plan.first_step - 1)
    try:
        with ExitStack() as stack:
            stack.enter_context(display)
            recorder = RunRecorder(config, display, first_step=plan.first_step)
            with recorder.phase("start"):
                stack.enter_context(connected(config.cluster))
                workers = stack.enter_context(WorkerGroup(config))
            if config.has_rollout_engine:
                display.fact("rollout engine", workers.places[0]["rollout_engine"])
            recorder.memory = lambda: peak_bytes(workers)
            TRAINERS[config.algorithm.name](plan, workers, recorder).run()
            recorder.finish()
    except (WorkerError, DockError, ConfigError) as error:
        print(f"run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: every process of the run was stopped.", file=sys.stderr)
        return 130
    return 0


def start_lines(plan: Plan) -> list[str]:
    """Where the run starts from, and what will not be as without the interruption."""
    aside = [step for step in complete_steps(checkpoints_of(plan.config)) if step >= plan.first_step]
    lines = []
    if plan.resume:
        lines.append(f"resume: after step {plan.resume.step} of {plan.resume.folder}")
        lines += [f"resume: {remark}" for remark in plan.resume.remarks]
    elif plan.resume_asked != "never":
        lines.append(f"resume: a fresh start, {checkpoints_of(plan.config)} holds no complete checkpoint")
    if aside:
        steps = ", ".join(map(str, aside))
        lines.append(f"checkpoints of other steps ({steps}) move to {checkpoints_of(plan.config)}.old")
    return lines + off_policy_lines(plan.config)


def off_policy_lines(config: Config) -> list[str]:
    """A remark where an older policy samples and nothing makes up for it."""
    rollout, correction = config.rollout, config.rollout_correction
    older = {"rollout.carry_prompts": rollout.carry_prompts, "rollout.ahead": rollout.ahead}
    keys = [f"{key}={str(value).lower()}" for key, value in older.items() if value]
    if not keys or correction.compares or correction.bypass_mode:
        return []
    return [f"{keys[0]}: an older policy draws tokens, uncorrected; rollout_correction.rollout_is: token weighs them"]


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """Ray, joined at `cluster.address` or started on this machine; what was started is stopped at the end."""
    # Ray would else set CUDA_VISIBLE_DEVICES= on actors that ask for no GPU, and print a warning about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    started = not cluster.address
    options: dict = {"address": cluster.address}
    if started:
        # "local", since RAY_ADDRESS in the environment would else make ray.init join another cluster.
        cpus = cluster.workers * cluster.cpus_per_worker
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        where = f"cluster.address={cluster.address}"
        raise WorkerError(f"no Ray cluster can be joined at {where}: {reason}") from None
    # Ray has just installed a handler that ends the process at once.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        ray.shutdown()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A terminated run ends as an interrupted one does: every process is stopped."""
    raise KeyboardInterrupt


def peak_bytes(workers: WorkerGroup) -> int:
    """The sum of the processes' peaks: an upper bound of what the run held at once."""
    pending = workers.call("peak_bytes").wait(timeout_s=workers.config.fault.train_timeout_s)
    pending += workers.call_reward("peak_bytes").wait(timeout_s=workers.config.fault.train_timeout_s)
    return own_peak_bytes() + sum(pending)
