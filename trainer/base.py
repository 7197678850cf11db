"""What every algorithm's loop stands on: steps, the dock, the phase change, checkpoints, evaluation, export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.train.checkpoint import step_folder
from trainer.columns import create_dock
from trainer.evaluation import evaluate
from trainer.preflight import Plan
from trainer.recorder import RunRecorder
from trainer.resume import DOCK, run_state
from trainer.shares import even_rows
from transfer_dock import Batch
from workers import WorkerGroup


class Trainer(ABC):
    """Trains the policy of `plan` on `workers`; every stage reads its columns from the dock and writes its own.

    An algorithm names its `stages` and writes `step`, its loop's body.
    """

    stages: ClassVar[Mapping[str, Sequence[str]]]
    """Each consumer of the dock, and the columns that it reads."""

    def __init__(self, plan: Plan, workers: WorkerGroup, recorder: RunRecorder) -> None:
        self.plan, self.config = plan, plan.config
        self.workers, self.recorder = workers, recorder
        self.first_step = plan.first_step
        self._model = fingerprint(plan.config.model.path)
        self.dock = create_dock(plan.config, self.stages, restore=plan.resume.dock if plan.resume else None)

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """Train for one step (counted from 1); returns its metrics."""

    def state(self) -> dict[str, Any]:
        """What the algorithm has to know to go on from a checkpoint, as JSON takes it; the workers keep their own.

        Called before the dock is saved: whatever still writes into it has to end first.
        """
        return {}

    def run(self) -> None:
        """All steps that are left, then the last checkpoint and the export."""
        try:
            self._load()
            for step in range(self.first_step, self.config.run.steps + 1):
                with self.recorder.step(step) as record:
                    self._begin_step(step)
                    record.update(self.step(step))
                    record["data/epochs"] = self.plan.prompts.epochs
                self._save(step)
            self._finish_checkpoint()
            self._export()
        finally:
            self.dock.close()

    def _begin_step(self, step: int) -> None:
        """Tell the workers, where some of them record what they do in some steps."""
        if self.config.profiler.steps:
            self.workers.call("begin_step", step).wait(timeout_s=self.config.fault.train_timeout_s)

    # ---- what loops call

    def swap(self, method: str, *arguments: int | str) -> None:
        """The phase change that `method` of the workers makes, timed, its ledger written."""
        with self.recorder.phase("swap"):
            reports = self.workers.call(method, *arguments).wait(timeout_s=self.config.fault.train_timeout_s)
            self.recorder.swap(reports)

    def evaluates_at(self, step: int) -> bool:
        """Whether the step is one of eval.every."""
        return bool(self.plan.eval_prompts) and step % self.config.eval.every == 0

    def evaluate(self, step: int) -> dict[str, float]:
        """Answers to the held-out prompts, where the step is one of eval.every; the engines must have the cards."""
        if not self.evaluates_at(step):
            return {}
        with self.recorder.phase("eval"):
            return evaluate(self.plan.eval_prompts, self.config, self.workers)

    def give_cards_to_trainer(self, step: int) -> None:
        """After the rollout of `step`."""
        self.swap("swap_to_train")

    def on_train_ranks(
        self, method: str, shares: Sequence[Any], arguments: Callable[[Any], Sequence[Any]] = lambda share: (share,)
    ) -> list[Any]:
        """Call `method` on all workers, each with the share of its data-parallel rank in the trainer's layout."""
        own = [arguments(share) for share in self.workers.by_data_rank("train", shares)]
        return self.workers.call_each(method, own).wait(timeout_s=self.config.fault.train_timeout_s)

    def lease(self, stage: str, step: int) -> Batch:
        """All samples that `stage` learns from in this step; waits for the last of them."""
        return self.dock.get(stage, self.config.samples_per_step, whole_groups=True, step=step)

    def run_stage(self, stage: str, step: int, *arguments: Any) -> list[Any]:
        """Have the workers' method `stage` look at all samples of the stage of that name, each at its share of them."""
        batch = self.lease(stage, step)
        shares = batch.split(even_rows(len(batch.keys), self.config.train_data_parallel))
        results = self.on_train_ranks(stage, shares, lambda share: (self.dock, share, *arguments))
        self.dock.ack(batch)
        return results

    # ---- checkpoints

    def _load(self) -> None:
        point = self.plan.resume
        if point is not None:
            pending = self.workers.call("load_checkpoint", str(point.folder.resolve()), point.step)
            pending.wait(timeout_s=self.config.fault.train_timeout_s)

    def _save(self, step: int) -> None:
        """Have the state copied; it is written while the next step runs."""
        last, every = step == self.config.run.steps, self.config.checkpoint.every
        if last or (every and step % every == 0):
            with self.recorder.phase("checkpoint"):
                folder = self.recorder.checkpoints.resolve()
                state = self._run_state()
                self._save_dock(step_folder(folder, step) / DOCK)
                pending = self.workers.call("save_checkpoint", str(folder), step, state)
                pending.wait(timeout_s=self.config.fault.train_timeout_s)

    def _run_state(self) -> dict[str, Any]:
        """What this process has to know to go on; the workers keep the rest."""
        return run_state(
            self.config,
            model=self._model,
            prompts=self.plan.prompts.state(),
            prompts_needed=self.plan.prompts_needed,
            algorithm=self.state(),
        )

    def _save_dock(self, path: Path) -> None:
        """Between two steps the dock is empty, but for samples of the next one that wait there."""
        path.unlink(missing_ok=True)
        if self.dock.status()["samples"]:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.dock.save(str(path))

    def _finish_checkpoint(self) -> None:
        with self.recorder.phase("checkpoint"):
            self.workers.call("finish_checkpoint").wait(timeout_s=self.config.fault.train_timeout_s)

    def _export(self) -> None:
        if self.config.checkpoint.export:
            with self.recorder.phase("export"):
                pending = self.workers.call("export", str(self.recorder.export.resolve()))
                pending.wait(timeout_s=self.config.fault.train_timeout_s)
