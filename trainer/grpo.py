"""GRPO (DeepSeekMath, arXiv 2402.03300): the loop, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qerl_rl.algorithms.advantages import group_advantages
from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.train.checkpoint import step_folder
from trainer.columns import create_dock
from trainer.preflight import Plan
from trainer.recorder import RunRecorder
from trainer.resume import DOCK, run_state
from trainer.shares import even_rows, group_rows, mini_batch_rows, update_shares
from transfer_dock import Batch, Jagged, SampleKey
from workers import WorkerGroup


class GrpoTrainer:
    """Trains the policy of `plan` on `workers`; every stage reads its columns from the dock and writes its own."""

    def __init__(self, plan: Plan, workers: WorkerGroup, recorder: RunRecorder) -> None:
        self.plan, self.config = plan, plan.config
        self.workers, self.recorder = workers, recorder
        self.first_step = plan.first_step
        self._model = fingerprint(plan.config.model.path)
        self.dock = create_dock(plan.config, restore=plan.resume.dock if plan.resume else None)

    def run(self) -> None:
        """All steps that are left, then the last checkpoint and the export."""
        try:
            self._load()
            for step in range(self.first_step, self.config.run.steps + 1):
                with self.recorder.step(step) as record:
                    record.update(self._step(step))
                self._save(step)
            self._finish_checkpoint()
            self._export()
        finally:
            self.dock.close()

    def _step(self, step: int) -> dict[str, float]:
        phase, samples = self.recorder.phase, self.config.samples_per_step
        self._put_prompts(step)
        with phase("swap"):
            self._swap("swap_to_rollout", step)
        with phase("rollout"):
            scoring = self.workers.call_reward("score", self.dock, samples)
            rollout = self._generate(step)
        with phase("reward"):
            scores = scoring.wait(timeout_s=self.config.fault.rollout_timeout_s)[0]
            rewards = self._advantages(step)
        evaluation = self._evaluate(step)
        with phase("swap"):
            self._swap("swap_to_train")
        with phase("log_probs"):
            policy = self._log_probs(step)
        with phase("update"):
            update = self._update(step)
        self.dock.close_step(step)
        return {**rollout, "reward/failures": scores["failures"], **rewards, **evaluation, **policy, **update}

    def _put_prompts(self, step: int) -> None:
        """One row a sample: the prompt is repeated for each of its group."""
        size = self.config.algorithm.samples_per_prompt
        prompts = [p for p in self.plan.prompts.next(self.config.algorithm.prompts_per_step) for _ in range(size)]
        keys = [SampleKey(step, row // size, row % size) for row in range(len(prompts))]
        columns = {
            "prompts": Jagged.from_rows([prompt.tokens for prompt in prompts]),
            "prompt_texts": [prompt.text for prompt in prompts],
            "answers": [prompt.answer for prompt in prompts],
        }
        self.dock.put(columns, keys)

    def _swap(self, method: str, *arguments: int) -> None:
        reports = self.workers.call(method, *arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        self.recorder.swap(reports)

    def _generate(self, step: int) -> dict[str, float]:
        total = self.config.samples_per_step
        prompts = self.dock.get("rollout", total, whole_groups=True, step=step)
        leases = prompts.split(group_rows(prompts.keys, self.config.rollout.data_parallel))
        shares = [lease if lease.keys else None for lease in leases]
        arguments = [(self.dock, share) for share in self.workers.by_data_rank("rollout", shares)]
        pending = self.workers.call_each("generate", arguments)
        results = pending.wait(timeout_s=self.config.fault.rollout_timeout_s, on_wait=lambda: self._show(total))
        self.dock.ack(prompts)
        return {"rollout/tokens": sum(result["tokens"] for result in results)}

    def _show(self, total: int) -> None:
        self.recorder.progress(self.dock.status()["columns"]["responses"], total)

    def _advantages(self, step: int) -> dict[str, float]:
        batch = self.dock.get("advantages", self.config.samples_per_step, whole_groups=True, step=step)
        rewards = torch.from_numpy(np.array(batch.columns["rewards"]))
        groups = torch.tensor([key.group for key in batch.keys])
        advantages = group_advantages(rewards, groups, normalize_std=self.config.algorithm.normalize_std)
        self.dock.put({"advantages": advantages.numpy()}, batch.keys)
        self.recorder.samples(step, batch, advantages.numpy())
        lengths = np.diff(batch.columns["responses"].offsets)
        truncated = np.asarray(batch.columns["truncated"])
        self.dock.ack(batch)
        spread = rewards.view(-1, self.config.algorithm.samples_per_prompt).std(dim=1)
        return {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/min": float(rewards.min()),
            "reward/max": float(rewards.max()),
            "reward/groups_without_signal": float((spread == 0).float().mean()),
            "response/length_mean": float(lengths.mean()),
            "response/truncated": float(truncated.mean()),
        }

    def _evaluate(self, step: int) -> dict[str, float]:
        """Greedy answers to the held-out prompts, with the policy that rolled this step out."""
        if not self.plan.eval_prompts or step % self.config.eval.every:
            return {}
        prompts = self.plan.eval_prompts
        with self.recorder.phase("eval"):
            ranks = self.config.rollout.data_parallel
            rows = even_rows(len(prompts), ranks)
            shares = [([prompts[row].tokens for row in part],) for part in rows]
            pending = self.workers.call_each("evaluate", self.workers.by_data_rank("rollout", shares))
            results = pending.wait(timeout_s=self.config.fault.rollout_timeout_s)
            answers = [result for result in results if result is not None]
            problems = [
                (prompts[row].text, answer.tolist(), prompts[row].answer)
                for part, own in zip(rows, answers, strict=True)
                for row, answer in zip(part, own, strict=True)
            ]
            scores = self.workers.call_reward("score_texts", problems)
            rewards = scores.wait(timeout_s=self.config.fault.rollout_timeout_s)[0]
        return {"eval/reward_mean": float(np.mean(rewards))}

    def _log_probs(self, step: int) -> dict[str, float]:
        batch = self.dock.get("log_probs", self.config.samples_per_step, whole_groups=True, step=step)
        shares = batch.split(even_rows(len(batch.keys), self.config.train_data_parallel))
        arguments = [(self.dock, share) for share in self.workers.by_data_rank("train", shares)]
        results = self.workers.call_each("log_probs", arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        self.dock.ack(batch)
        return token_weighted([result for result in results if result])

    def _update(self, step: int) -> dict[str, float]:
        batch = self.dock.get("update", self.config.samples_per_step, whole_groups=True, step=step)
        algorithm = self.config.algorithm
        random = np.random.default_rng([self.config.run.seed, step])
        rows = mini_batch_rows(batch.keys, algorithm.prompts_per_mini_batch, algorithm.epochs_per_step, random)
        shares = update_shares(batch, rows, self.config.train_data_parallel)
        arguments = [(share, step) for share in self.workers.by_data_rank("train", shares)]
        results = self.workers.call_each("update", arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        self.dock.ack(batch)
        metrics = {name: float(np.mean([update[name] for update in results[0]])) for name in results[0][0]}
        # The entropy of a step is that of the policy that rolled it out; later mini-batches see a newer one.
        metrics.pop("entropy", None)
        return {**metrics, "train/tokens": float(algorithm.epochs_per_step * _token_count(batch))}

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
                self._save_dock(step_folder(folder, step) / DOCK)
                state = self._state()
                pending = self.workers.call("save_checkpoint", str(folder), step, state)
                pending.wait(timeout_s=self.config.fault.train_timeout_s)

    def _state(self) -> dict[str, Any]:
        """What this process has to know to go on; the workers keep the rest."""
        plan = self.plan
        return run_state(
            self.config, model=self._model, prompts=plan.prompts.state(), prompts_needed=plan.prompts_needed
        )

    def _save_dock(self, path: Path) -> None:
        """Between two steps the dock is empty; only samples that outlive their step are worth a file."""
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


def token_weighted(parts: list[dict[str, float]]) -> dict[str, float]:
    """Means of the ranks' means, weighted by their `tokens`; a name that ends in _max is a maximum."""
    weights = [part["tokens"] for part in parts]
    names = [name for name in parts[0] if name != "tokens"]
    return {
        name: max(part[name] for part in parts)
        if name.endswith("_max")
        else float(np.average([part[name] for part in parts], weights=weights))
        for name in names
    }


def _token_count(batch: Batch) -> int:
    return int(batch.columns["prompts"].offsets[-1] + batch.columns["responses"].offsets[-1])
