"""GRPO (DeepSeekMath, arXiv 2402.03300): the loop, stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qerl_rl.algorithms.choices import advantages_by_token
from qerl_rl.algorithms.dapo import kept_samples
from qerl_rl.algorithms.kl import next_kl_coefficient
from qerl_rl.algorithms.sequences import sequence_ids, sequence_means
from qerl_rl.quant.fingerprint import fingerprint
from qerl_rl.train.checkpoint import step_folder
from trainer.columns import create_dock
from trainer.evaluation import evaluate, prefixed
from trainer.outcome import step_outcome
from trainer.preflight import Plan
from trainer.recorder import RunRecorder
from trainer.resume import DOCK, run_state
from trainer.selection import Selection
from trainer.shares import even_rows, group_rows, kept_rows, mini_batch_rows, update_shares
from transfer_dock import Batch, Jagged, SampleKey
from workers import WorkerGroup


class GrpoTrainer:
    """Trains the policy of `plan` on `workers`; every stage reads its columns from the dock and writes its own."""

    def __init__(self, plan: Plan, workers: WorkerGroup, recorder: RunRecorder) -> None:
        self.plan, self.config = plan, plan.config
        self.workers, self.recorder = workers, recorder
        self.first_step = plan.first_step
        self._model = fingerprint(plan.config.model.path)
        point = plan.resume
        self.dock = create_dock(plan.config, restore=point.dock if point else None)
        self.kl_coefficient = point.state["kl_coefficient"] if point else plan.config.algorithm.kl_coefficient
        """Of the next update; algorithm.kl_target steers it."""

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
        phase = self.recorder.phase
        with phase("swap"):
            self._swap("swap_to_rollout", step)
        rollout, selection = self._roll_out(step)
        evaluation = self._evaluate(step)
        with phase("swap"):
            self._swap("swap_to_train")
        with phase("log_probs"):
            policy = self._log_probs(step, selection)
        with phase("reward"):
            rewards = self._advantages(step)
        with phase("update"):
            update = self._update(step)
        self.dock.close_step(step, carry_unfinished=False)
        data = {"data/epochs": self.plan.prompts.epochs}
        return {**data, **rollout, **rewards, **evaluation, **policy, **update}

    def _roll_out(self, step: int) -> tuple[dict[str, float], Selection]:
        """Sample and score, again for groups without signal as long as algorithm.sampling_rounds allows."""
        algorithm, selection = self.config.algorithm, Selection(self.config.algorithm.prompts_per_step)
        tokens, rounds = 0.0, []
        for _ in range(algorithm.sampling_rounds):
            groups = selection.missing
            if not groups:
                break
            self._put_prompts(step, selection.sampled, groups)
            with self.recorder.phase("rollout"):
                scoring = self.workers.call_reward("score", self.dock, groups * algorithm.samples_per_prompt)
                tokens += self._generate(step, groups * algorithm.samples_per_prompt)
            with self.recorder.phase("reward"):
                scores = scoring.wait(timeout_s=self.config.fault.rollout_timeout_s)[0]
                rounds.append((groups, scores))
                if algorithm.sampling_rounds == 1:
                    selection.add_all(groups)
                else:
                    batch = self.dock.get("selection", groups * algorithm.samples_per_prompt, step=step)
                    selection.add(batch.keys, np.array(batch.columns["rewards"]))
                    self.dock.ack(batch)
        return {"rollout/tokens": tokens, **reward_metrics(rounds), **selection.metrics()}, selection

    def _put_prompts(self, step: int, first_group: int, groups: int) -> None:
        """One row a sample: the prompt is repeated for each of its group."""
        size = self.config.algorithm.samples_per_prompt
        prompts = [p for p in self.plan.prompts.next(groups) for _ in range(size)]
        keys = [SampleKey(step, first_group + row // size, row % size) for row in range(len(prompts))]
        columns = {
            "prompts": Jagged.from_rows([prompt.tokens for prompt in prompts]),
            "prompt_texts": [prompt.text for prompt in prompts],
            "answers": [prompt.answer for prompt in prompts],
        }
        self.dock.put(columns, keys)

    def _swap(self, method: str, *arguments: int) -> None:
        reports = self.workers.call(method, *arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        self.recorder.swap(reports)

    def _generate(self, step: int, total: int) -> float:
        """Answer the `total` prompts that wait; returns the tokens of all responses."""
        prompts = self.dock.get("rollout", total, whole_groups=True, step=step)
        leases = prompts.split(group_rows(prompts.keys, self.config.rollout.data_parallel))
        shares = [lease if lease.keys else None for lease in leases]
        arguments = [(self.dock, share) for share in self.workers.by_data_rank("rollout", shares)]
        pending = self.workers.call_each("generate", arguments)
        results = pending.wait(timeout_s=self.config.fault.rollout_timeout_s, on_wait=lambda: self._show(total))
        self.dock.ack(prompts)
        return sum(result["tokens"] for result in results)

    def _show(self, total: int) -> None:
        self.recorder.progress(self.dock.status()["columns"]["responses"], total)

    def _advantages(self, step: int) -> dict[str, float]:
        batch = self.dock.get("advantages", self.config.samples_per_step, whole_groups=True, step=step)
        outcome, metrics = step_outcome(self.config, batch, self.kl_coefficient)
        advantages = advantages_by_token(outcome, self.config.algorithm)
        rows = np.split(advantages.numpy(), outcome.lengths.cumsum(0)[:-1].numpy())
        self.dock.put({"advantages": Jagged.from_rows(rows)}, batch.keys)
        means = sequence_means(advantages, sequence_ids(outcome.lengths), len(batch.keys))
        self.recorder.samples(step, batch, means.numpy())
        self.dock.ack(batch)
        return metrics

    def _evaluate(self, step: int) -> dict[str, float]:
        """Answers to the held-out prompts, by the policy that rolled this step out."""
        if not self.plan.eval_prompts or step % self.config.eval.every:
            return {}
        with self.recorder.phase("eval"):
            return evaluate(self.plan.eval_prompts, self.config, self.workers)

    def _log_probs(self, step: int, selection: Selection) -> dict[str, float]:
        """Of the selected samples; the stages after this one never see the others, which lack these columns."""
        sampled = selection.sampled * self.config.algorithm.samples_per_prompt
        batch = self.dock.get("log_probs", sampled, whole_groups=True, step=step)
        rows = selection.rows(batch.keys)
        parts = even_rows(len(rows), self.config.train_data_parallel)
        shares = batch.split([[rows[i] for i in part] for part in parts])
        arguments = [(self.dock, share) for share in self.workers.by_data_rank("train", shares)]
        results = self.workers.call_each("log_probs", arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        self.dock.ack(batch)
        return token_weighted([result for result in results if result])

    def _update(self, step: int) -> dict[str, float]:
        batch = self.dock.get("update", self.config.samples_per_step, whole_groups=True, step=step)
        algorithm = self.config.algorithm
        random = np.random.default_rng([self.config.run.seed, step])
        rows = mini_batch_rows(batch.keys, algorithm.prompts_per_mini_batch, algorithm.epochs_per_step, random)
        if algorithm.mask_truncated:
            kept = kept_samples(torch.from_numpy(np.array(batch.columns["truncated"]))).tolist()
            rows = kept_rows(rows, kept)
        metrics = self._update_on(batch, rows, step) if rows else {}
        tokens = _token_counts(batch)
        self.dock.ack(batch)
        return {**metrics, "train/tokens": float(sum(tokens[update].sum() for update in rows))}

    def _update_on(self, batch: Batch, rows: list[list[int]], step: int) -> dict[str, float]:
        """One optimizer update on each list of rows; their mean metrics."""
        algorithm = self.config.algorithm
        shares = update_shares(batch, rows, self.config.train_data_parallel)
        arguments = [(share, step, self.kl_coefficient) for share in self.workers.by_data_rank("train", shares)]
        results = self.workers.call_each("update", arguments).wait(timeout_s=self.config.fault.train_timeout_s)
        metrics = {name: float(np.mean([update[name] for update in results[0]])) for name in results[0][0]}
        # The entropy of a step is that of the policy that rolled it out; later mini-batches see a newer one.
        metrics.pop("entropy", None)
        metrics["kl/coefficient"] = self.kl_coefficient
        self.kl_coefficient = next_kl_coefficient(
            self.kl_coefficient,
            metrics["kl/reference"],
            target=algorithm.kl_target,
            horizon=algorithm.kl_horizon,
            samples=self.config.samples_per_step,
        )
        return metrics

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
        return run_state(
            self.config,
            model=self._model,
            prompts=self.plan.prompts.state(),
            prompts_needed=self.plan.prompts_needed,
            kl_coefficient=self.kl_coefficient,
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


def reward_metrics(rounds: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Of the groups and scores of each sampling round: all failures, and the means over all samples."""
    groups = sum(count for count, _ in rounds)
    names = [name for name in rounds[0][1] if name != "failures"]
    means = {name: sum(count * scores[name] for count, scores in rounds) / groups for name in names}
    return prefixed("reward", {"failures": sum(scores["failures"] for _, scores in rounds), **means})


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


def _token_counts(batch: Batch) -> np.ndarray:
    """Tokens of each row, prompt and response together."""
    return np.diff(batch.columns["prompts"].offsets) + np.diff(batch.columns["responses"].offsets)
