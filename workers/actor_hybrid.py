"""The worker of one card: a Megatron trainer and a vLLM engine in one process, one of them at work at a time."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from qerl_rl.config.loader import from_dict
from qerl_rl.metrics.profile import StageProfiler, stage
from qerl_rl.reshard.ledger import CRITIC, POLICY, REWARD_MODEL, SwapReport
from qerl_rl.start_up import collector_paused
from transfer_dock import Batch, Jagged, TransferDock
from workers.batches import ages_of, group_requests, put_responses, to_samples

if TYPE_CHECKING:
    from qerl_rl.algorithms.grpo import LossFunction
    from qerl_rl.train.engine import TrainEngine
    from qerl_rl.train.model_engine import ModelEngine
    from qerl_rl.train.samples import Samples
    from qerl_rl.train.value_engine import RewardModelEngine, ValueEngine


class ActorHybridWorker:
    """Trains and rolls out the policy on one card; made by `WorkerGroup`, or directly in a process of one's own.

    Every rank gets the same calls in the same order, since both engines use collectives. Samples come from and go to
    the dock; only small figures are returned.

    Args: config: the launch configuration as `dataclasses.asdict` gives it. rank, world_size: place among the workers.
    """

    critic: ValueEngine
    """In ppo only."""
    reward_model: RewardModelEngine
    """Where reward_model.backend is megatron."""

    def __init__(self, config: dict[str, Any], rank: int, world_size: int) -> None:
        self.config = from_dict(config)
        self.rank, self.world_size = rank, world_size
        self.profiler = StageProfiler(self.config, rank)

    def begin_step(self, step: int) -> None:
        """What comes next is done in `step` of the loop, for profiler.steps; what is told a step says so by itself."""
        self.profiler.step = step

    def reserve_address(self) -> tuple[str, int]:
        """Address and free port of this worker's node, for rank 0 to be the rendezvous of all."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def node(self) -> str:
        """The machine of this worker, as Ray names it."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def start(self, address: str, port: int, local_rank: int | None = None) -> dict[str, Any]:
        """Load the engines that the run needs; returns this rank's place in the layouts, and how the rollout runs.

        local_rank: which of the workers, and cards, of its machine this is (None: its rank, there is one machine).
        """
        with collector_paused():
            self._start(address, port, self.rank if local_rank is None else local_rank)
        return {
            "train_data_rank": self.train.data_parallel_rank,
            "rollout_data_rank": self.rank // self.config.rollout.tensor_parallel,
            "rollout_engine": f"{self.rollout.description}; {self._base}" if self.config.has_rollout_engine else "",
        }

    def _start(self, address: str, port: int, local_rank: int) -> None:
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port), RANK=str(self.rank), LOCAL_RANK=str(local_rank))
        os.environ.update(WORLD_SIZE=str(self.world_size), LOCAL_WORLD_SIZE=str(self.world_size))

        from qerl_rl.platform import detect, prepare_megatron
        from qerl_rl.platform.determinism import compute_deterministically

        device = detect(self.config.train.device)
        device.select(local_rank)
        prepare_megatron(device, self.config)
        import torch

        if self.config.run.deterministic:
            compute_deterministically()
        torch.distributed.init_process_group(device.collective_backend, rank=self.rank, world_size=self.world_size)
        self.train, beside = self._load_models()
        if self.config.has_rollout_engine:
            self._start_rollout(beside)
        seed_global_generators(self.config.run.seed, self.rank)

    def _start_rollout(self, beside: Mapping[str, ModelEngine]) -> None:
        from qerl_rl.platform import detect
        from qerl_rl.rollout.environment import ask_for_batch_invariance

        if self.config.run.deterministic:
            ask_for_batch_invariance(detect(self.config.train.device).name)
        # Importing vLLM takes seconds, which a run without a rollout is spared.
        from qerl_rl.reshard.shared_base import share_base
        from qerl_rl.reshard.swap import Swap
        from qerl_rl.rollout.vllm_engine import VllmEngine
        from qerl_rl.train.background import BackgroundJob

        self.rollout = VllmEngine(
            self.config.model.path,
            self.config.rollout,
            self.config.lora,
            max_length=self.config.model.max_length,
            seed=self.config.run.seed,
            record_routing=self.config.router_replay.is_on,
            quantize_to=None if self.train.has_adapters else self.config.quant.format,
            group_size=self.config.quant.group_size,
        )
        self.swap = Swap(self.train, self.rollout, self.config, beside)
        self._base = "base stored for each engine, as model.share_base says"
        if self.config.model.share_base == "auto":
            self._base = share_base(self.rollout, {POLICY: self.train, **beside}, self.swap.give)
        self._generation: BackgroundJob[dict[str, Any]] = BackgroundJob("generation")
        self.rollout.release_kv_cache()

    def _load_models(self) -> tuple[TrainEngine, dict[str, ModelEngine]]:
        """The policy, and what takes turns with it; each is out of memory while the next one loads."""
        from qerl_rl.platform import detect
        from qerl_rl.platform.state_store import state_store
        from qerl_rl.train.engine import TrainEngine
        from qerl_rl.train.value_engine import RewardModelEngine, ValueEngine

        # Beside the run's other files: the folder for temporary files may itself be memory.
        folder = self.config.run.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)
        device = detect(self.config.train.device)
        train = TrainEngine(self.config, state_store(device, folder))
        beside: dict[str, ModelEngine] = {}
        if self._has_critic:
            train.offload()
            self.critic = beside[CRITIC] = ValueEngine(self.config, state_store(device, folder))
        if self.config.reward_model.on_the_cards:
            for engine in (train, *beside.values()):
                engine.offload()
            self.reward_model = beside[REWARD_MODEL] = RewardModelEngine(self.config, state_store(device, folder))
        return train, beside

    @property
    def _has_critic(self) -> bool:
        return self.config.algorithm.name == "ppo"

    def swap_to_rollout(self, step: int) -> SwapReport:
        """Serve the newest policy, with the noise of `step`."""
        self.begin_step(step)
        with self.profiler.stage("swap_to_rollout"):
            return self.swap.to_rollout(step)

    @stage("swap_to_train")
    def swap_to_train(self, model: str = POLICY) -> SwapReport:
        """Give the card to the trainer: of the policy, or of `critic` or `reward_model`."""
        return self.swap.to_train(model)

    @stage("swap_to_rollout")
    def publish(self, step: int) -> SwapReport:
        """Serve the newest policy, to sample for `step`, while this rank goes on training.

        The noise comes with `start_generation`.
        """
        return self.swap.publish(step)

    @stage("rollout")
    def generate(self, dock: TransferDock, prompts: Batch | None, quota: int | None = None) -> dict[str, Any]:
        """Answer the prompts of this data-parallel rank's lease (None: no prompts), writing each group when it is done.

        Writes the columns responses, rollout_log_probs and truncated. Ranks of one engine generate the same; its first
        one writes. quota: stop when this many groups are done, and write left_responses and left_log_probs of the
        others; None waits for all.
        Returns: `tokens` drawn, `seconds`, `unfinished` samples, and the `ages` of the groups that are done.
        """
        begin = perf_counter()
        requests, keys = group_requests(prompts, self.config.run.seed, self.config.rollout)
        had = {request.group: sum(len(partial.tokens) for partial in request.partials) for request in requests}
        tokens, unfinished, done = 0, 0, []
        for output in self.rollout.generate(requests, quota=quota):
            if not self._writes_rollouts:
                continue
            tokens += sum(len(response) for response in output.responses) - had[output.group]
            unfinished += output.finish_reasons.count("unfinished")
            if not output.left:
                done.append(keys[output.group][0])
            put_responses(dock, keys[output.group], output)
        return {
            "tokens": float(tokens),
            "unfinished": unfinished,
            "ages": ages_of(prompts, done) if quota else [],
            "seconds": perf_counter() - begin,
        }

    def start_generation(self, dock: TransferDock, prompts: Batch | None, step: int) -> None:
        """Begin `generate` in a thread, with the noise of `step`; this rank may train until `finish_generation`.

        Meanwhile nothing else may be asked of the rollout engine. The two engines share no process group.
        """
        self.swap.set_noise(step)
        self._generation.start(lambda: self.generate(dock, prompts))

    def finish_generation(self) -> dict[str, Any]:
        """What `generate` returned in the background; raises what it raised."""
        result = self._generation.wait()
        if result is None:
            raise RuntimeError("finish_generation() without start_generation()")
        return result

    @property
    def _writes_rollouts(self) -> bool:
        return self.rank % self.config.rollout.tensor_parallel == 0

    def evaluate(self, prompts: Sequence[tuple[np.ndarray, int]]) -> list[list[np.ndarray]] | None:
        """Answers to (token prompt, seed) pairs by the policy without noise; None on ranks that repeat another's work.

        One greedy answer each, or eval.samples drawn at eval.temperature.
        """
        from qerl_rl.rollout.engine import GroupRequest

        self.swap.set_noise(0)
        own = self.config.eval
        requests = [GroupRequest(i, prompt, own.samples, seed) for i, (prompt, seed) in enumerate(prompts)]
        outputs = self.rollout.generate(requests, temperature=own.temperature, greedy=own.samples == 1)
        answers = {output.group: output.responses for output in outputs}
        return [answers[i] for i in range(len(prompts))] if self._writes_rollouts else None

    def log_probs(self, dock: TransferDock, batch: Batch, step: int = 0) -> dict[str, float]:
        """Old and reference log-probs of this rank's samples into the dock; returns means over their tokens.

        With noise.log_probs=noisy the old ones are those of the policy with the noise of `step`, which sampled. In
        rollout_correction.bypass_mode they are the engine's, and nothing is known of the mismatch. There may be no
        reference (`Config.has_reference`).
        """
        samples, bypass = to_samples(batch), self.config.rollout_correction.bypass_mode
        noise = self.swap.noise_of(step if self.config.noise.log_probs == "noisy" else 0)
        with self.profiler.stage("old_log_probs"):
            old = None if bypass else self.train.log_probs(samples, noise=noise)
            clean = self.train.log_probs(samples) if noise.sigma and not bypass else old
        with self.profiler.stage("reference_log_probs"):
            reference = self.train.log_probs(samples, reference=True) if self.config.has_reference else None
        if not self.train.is_output_rank:
            return {}
        from qerl_rl.algorithms.mismatch import noise_mismatch
        from workers.comparison import comparison

        rollout_rows = list(batch.columns["rollout_log_probs"].rows())
        old_rows = rollout_rows if old is None else old.log_probs
        columns = {"old_log_probs": Jagged.from_rows(old_rows)}
        if reference is not None:
            columns["reference_log_probs"] = Jagged.from_rows(reference.log_probs)
        dock.put(columns, batch.keys)
        passed = old or reference
        metrics = {"tokens": float(samples.response_tokens), **(passed.router_replay if passed else {})}
        if self.config.noise.enabled:
            metrics["noise/sigma"] = self.swap.noise_of(step).sigma
        if old is not None and clean is not None:
            metrics["entropy"] = float(np.concatenate(old.entropy).mean())
            metrics |= comparison(rollout_rows, old_rows, self.config.rollout_correction)
            metrics |= noise_mismatch(old_rows, clean.log_probs) if noise.sigma else {}
        return metrics

    @stage("reward")
    def model_scores(self, dock: TransferDock, batch: Batch) -> None:
        """The reward model's score of each of this rank's samples into the dock; it must have the card."""
        scores = self.reward_model.scores(to_samples(batch))
        if scores is not None:
            dock.put({"model_scores": scores}, batch.keys)

    @stage("values")
    def values(self, dock: TransferDock, batch: Batch) -> None:
        """The critic's values of this rank's samples, one a response token, into the dock; it must have the card."""
        values = self.critic.values(to_samples(batch))
        if values is not None:
            dock.put({"values": Jagged.from_rows(values)}, batch.keys)

    @stage("critic_update")
    def update_critic(self, batches: Sequence[Batch]) -> list[dict[str, float]]:
        """One optimizer update of the critic for each mini-batch share; the metrics of each, equal on all ranks."""
        from qerl_rl.algorithms.ppo import value_loss

        loss_function, aggregation = value_loss(self.config.critic), self.config.algorithm.loss_aggregation
        return [
            self.critic.update(to_samples(batch, ("values", "returns")), loss_function, aggregation=aggregation)
            for batch in batches
        ]

    @stage("reference_log_probs")
    def reference_log_probs(self, dock: TransferDock, batch: Batch) -> None:
        """Log-probs of this rank's responses by the model that training began with, into the dock."""
        reference = self.train.log_probs(to_samples(batch), reference=True)
        if reference is not None:
            dock.put({"reference_log_probs": Jagged.from_rows(reference.log_probs)}, batch.keys)

    def update(self, batches: Sequence[Batch], step: int, kl_coefficient: float) -> list[dict[str, float]]:
        """One optimizer update for each mini-batch share; returns the metrics of each, equal on all ranks.

        kl_coefficient takes the place of the configured one, which the driver may steer.
        """
        from qerl_rl.algorithms.grpo import grpo_loss
        from workers.weight_means import WeightMeans

        algorithm = dataclasses.replace(self.config.algorithm, kl_coefficient=kl_coefficient)
        correction = self.config.rollout_correction
        columns = ["old_log_probs", "advantages"]
        if self.config.has_reference:
            columns.append("reference_log_probs")
        if correction.compares:
            columns.append("rollout_log_probs")
        means = WeightMeans(batches, correction, self.train)

        def loss_of(samples: Samples) -> LossFunction:
            return grpo_loss(algorithm, correction, weight_mean=means(samples))

        return self._updates(batches, step, columns, loss_of, algorithm.loss_aggregation)

    def update_pairs(self, batches: Sequence[Batch], step: int) -> list[dict[str, float]]:
        """`update` on pairs of a chosen and a rejected response: of each batch rows 0 and 1, 2 and 3, ..."""
        from qerl_rl.algorithms.dpo import pair_loss
        from qerl_rl.algorithms.sequences import PAIR_MEAN

        loss_function = pair_loss(self.config.dpo)
        return self._updates(batches, step, ("reference_log_probs",), lambda samples: loss_function, PAIR_MEAN)

    def _updates(
        self,
        batches: Sequence[Batch],
        step: int,
        columns: Sequence[str],
        loss_of: Callable[[Samples], LossFunction],
        aggregation: str,
    ) -> list[dict[str, float]]:
        self.begin_step(step)
        with self.profiler.stage("update"):
            shares = (to_samples(batch, columns) for batch in batches)
            return [self.train.update(samples, loss_of(samples), aggregation=aggregation) for samples in shares]

    def _give(self, model: str) -> None:
        """Put `model` into memory; without a rollout engine the policy has it for itself."""
        if self.config.has_rollout_engine:
            self.swap.give(model)

    def save_checkpoint(self, folder: str, step: int, run: dict[str, Any]) -> None:
        """Copy this rank's training state and write it below `folder` while the next step runs; `run` joins the meta.

        Raises: CheckpointError when the one before could not be written.
        """
        beside = []
        if self._has_critic:
            self._give(CRITIC)
            beside.append(self.critic.snapshot())
        self._give(POLICY)
        self.train.save_checkpoint(Path(folder), step, beside=beside, extra={"run": run}, background=True)

    def finish_checkpoint(self) -> None:
        """Until the checkpoint under way is on the disk. Raises: CheckpointError."""
        self.train.finish_checkpoint()

    def load_checkpoint(self, folder: str, step: int) -> None:
        """Continue from the checkpoint of `step` below `folder`; the rollout engine gets it with the next swap."""
        if self._has_critic:
            self._give(CRITIC)
            self.critic.load_checkpoint(Path(folder), step)
        self._give(POLICY)
        self.train.load_checkpoint(Path(folder), step)

    def export(self, folder: str) -> None:
        """Write the merged HF model and the adapter below `folder`; collective, rank 0 writes."""
        self._give(POLICY)
        self.train.export(Path(folder))

    def peak_bytes(self) -> int:
        """The most memory this process has held, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seed_global_generators(seed: int, rank: int) -> None:
    """Python and numpy start from the operating system's randomness; a loss of one's own may draw from them."""
    state = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
