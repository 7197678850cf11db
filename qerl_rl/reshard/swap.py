"""The phase change on one rank: the card goes from the trainer to the rollout engine and back.

Where adapters train, the quantized base never moves: both engines hold it since their start, each in its own layout,
and adapters go from the training shards into the slices of the engine's layout. Where everything trains, all weights
do, in the format that the engine holds. A critic and a reward model take turns with the policy while the trainer has
the card: one of them at a time is in memory, none during rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from qerl_rl.config.schema import Config
from qerl_rl.platform import detect
from qerl_rl.platform.state_store import StateStore, state_store
from qerl_rl.quant.noise import Noise, sigma_at
from qerl_rl.reshard.canary import Canary
from qerl_rl.reshard.ledger import POLICY, SwapReport
from qerl_rl.reshard.policy import PolicyTransfer
from qerl_rl.rollout.engine import RolloutEngine
from qerl_rl.train.engine import TrainEngine
from qerl_rl.train.model_engine import ModelEngine

if TYPE_CHECKING:
    from qerl_rl.train.shard_source import OnFinished


class Swap:
    """Moves one rank between the phases `rollout` and `train`; every rank must call the same change together.

    Args: beside: the models that take turns with the policy, by name; each phase of theirs is named after them.
    """

    def __init__(
        self,
        train: TrainEngine,
        rollout: RolloutEngine,
        config: Config,
        beside: Mapping[str, ModelEngine] | None = None,
    ) -> None:
        self._train, self._rollout, self._config = train, rollout, config
        self._models: dict[str, ModelEngine] = {POLICY: train, **(beside or {})}
        self._policy = PolicyTransfer(train, rollout, config)
        self._canary = Canary(train, rollout, config)
        self._served = 0

    def to_rollout(self, step: int) -> SwapReport:
        """Serve the policy as it is now, with the noise of `step` (counted from 1); train state leaves memory.

        Raises: TransferError, ChecksumError, CanaryError.
        """
        report = SwapReport("rollout")
        if self._train.is_away:
            # The last phase was another model's.
            with report.stage("onload"):
                self.give(POLICY)
        self._ask_canary(report)
        with report.stage("offload"):
            # Room for the engine's weights; what trains stays until it has been sent.
            report.release(self._offload(name for name in self._models if name != POLICY))
            report.release(_prefixed(POLICY, self._train.begin_offload()))
        if self._config.swap.release_weights and self._train.has_adapters:
            with report.stage("weights"):
                self._rollout.restore_weights()
        self._serve(report, step, self._train.let_go)
        with report.stage("offload"):
            report.release(_prefixed(POLICY, self._train.offload()))
        with report.stage("kv_cache"):
            self._rollout.restore_kv_cache()
        self._compare_canary(report, step)
        with report.stage("noise"):
            self.set_noise(step)
        self._weigh(report)
        return report

    def publish(self, step: int) -> SwapReport:
        """Serve the policy as it is now to sample for `step`, while the train state stays: both engines are in memory.

        Of the section swap of the configuration only the checks have an effect then.
        """
        report = SwapReport("rollout")
        self._ask_canary(report)
        self._serve(report, step)
        with report.stage("kv_cache"):
            self._rollout.restore_kv_cache()
        self._compare_canary(report, step)
        self._weigh(report)
        return report

    def to_train(self, model: str = POLICY) -> SwapReport:
        """Give the card to the trainer of `model`: what the engine holds and the other models leave, its state returns.

        Raises: KeyError when there is no such model.
        """
        report = SwapReport(model)
        if self._config.swap.release_kv_cache:
            with report.stage("kv_cache"):
                report.release({"rollout/kv_cache": self._rollout.release_kv_cache()})
        if self._config.swap.release_weights:
            with report.stage("weights"):
                report.release({"rollout/weights": self._rollout.release_weights(self._engine_store)})
        with report.stage("onload"):
            report.release(self.give(model))
        self._weigh(report)
        return report

    def give(self, model: str) -> dict[str, int]:
        """Put `model` into memory in place of the others. Returns the bytes that left, by model and kind."""
        released = self._offload(name for name in self._models if name != model)
        self._models[model].onload()
        return released

    # ---- the policy on its way

    def _serve(self, report: SwapReport, step: int, on_finished: OnFinished | None = None) -> None:
        """Bring the policy into the engine. on_finished: what becomes of a parameter that has been sent."""
        with report.stage("transfer"):
            moved = self._policy.move(step, check=self._is_due(self._config.swap.checksum), on_finished=on_finished)
        report.moved_bytes, report.traffic = moved.written_bytes, moved.traffic
        report.checksum_bytes = moved.checksum_bytes
        report.survival = self._rollout.survival
        self._served += 1

    def _is_due(self, when: str) -> bool:
        return when == "always" or (when == "first" and self._served == 0)

    def _ask_canary(self, report: SwapReport) -> None:
        if self._is_due(self._config.swap.canary):
            with report.stage("canary"):
                self._canary.ask_trainer()

    def _compare_canary(self, report: SwapReport, step: int) -> None:
        if self._canary.is_waiting:
            with report.stage("canary"):
                self.set_noise(0)
                report.canary = self._canary.compare(step)

    # ---- memory and noise

    @cached_property
    def _engine_store(self) -> StateStore | None:
        """Where the engine's weights stay; those of a policy that trains whole come anew with the next swap."""
        if not self._train.has_adapters:
            return None
        return state_store(detect(self._config.train.device), self._config.run.output_dir)

    def _offload(self, names: Iterable[str]) -> dict[str, int]:
        released: dict[str, int] = {}
        for name in names:
            released |= _prefixed(name, self._models[name].offload())
        return released

    def set_noise(self, step: int) -> None:
        """Put the noise of `step` (0: none) on the clean weights of the rollout engine."""
        self._rollout.set_noise(self.noise_of(step))

    def noise_of(self, step: int) -> Noise:
        """The noise of `step`; 0 has none."""
        noise, run = self._config.noise, self._config.run
        if step == 0 or not noise.enabled:
            return Noise()
        return Noise(sigma_at(step, run.steps, noise), run.seed, step, noise.exempt_router)

    def _weigh(self, report: SwapReport) -> None:
        report.held_bytes = self.held_bytes()
        report.device_bytes = detect(self._config.train.device).memory().used_bytes

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory now, by engine and kind."""
        held = _prefixed("rollout", self._rollout.held_bytes())
        for name, model in self._models.items():
            held |= _prefixed(name, model.held_bytes())
        return held


def _prefixed(engine: str, kinds: dict[str, int]) -> dict[str, int]:
    return {f"{engine}/{kind}": count for kind, count in kinds.items()}
