"""The phase change on one rank: the card goes from the trainer to the rollout engine and back.

The quantized base never moves: both engines hold it since their start, each in its own layout. What moves is the
adapter, from the training shards into the slices of the engine's layout. A critic and a reward model take turns with
the policy while the trainer has the card: one of them at a time is in memory, none during rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qerl_rl.config.schema import NoiseConfig, RunConfig, SwapConfig
from qerl_rl.quant.noise import Noise, sigma_at
from qerl_rl.reshard.ledger import POLICY, SwapReport
from qerl_rl.rollout.engine import RolloutEngine
from qerl_rl.train.engine import TrainEngine
from qerl_rl.train.model_engine import ModelEngine


class Swap:
    """Moves one rank between the phases `rollout` and `train`; every rank must call the same change together.

    Args: beside: the models that take turns with the policy, by name; each phase of theirs is named after them.
    """

    def __init__(
        self,
        train: TrainEngine,
        rollout: RolloutEngine,
        swap: SwapConfig,
        noise: NoiseConfig,
        run: RunConfig,
        beside: Mapping[str, ModelEngine] | None = None,
    ) -> None:
        self._train, self._rollout = train, rollout
        self._models: dict[str, ModelEngine] = {POLICY: train, **(beside or {})}
        self._config, self._noise, self._run = swap, noise, run

    def to_rollout(self, step: int) -> SwapReport:
        """Serve the policy as it is now, with the noise of `step` (counted from 1); train state leaves memory."""
        report = SwapReport("rollout")
        if self._train.is_away:
            # The last phase was another model's.
            with report.stage("onload"):
                self.give(POLICY)
        with report.stage("gather"):
            adapters = self._train.gather_adapters()
        with report.stage("offload"):
            report.released_bytes = self._offload(self._models)
        with report.stage("transfer"):
            report.moved_bytes = self._rollout.set_adapters(adapters, step)
        report.survival = self._rollout.survival
        with report.stage("noise"):
            self.set_noise(step)
        with report.stage("kv_cache"):
            self._rollout.restore_kv_cache()
        report.held_bytes = self.held_bytes()
        return report

    def publish(self, step: int) -> SwapReport:
        """Serve the policy as it is now to sample for `step`, while the train state stays: both engines are in memory.

        The section swap of the configuration has no effect then.
        """
        report = SwapReport("rollout")
        with report.stage("gather"):
            adapters = self._train.gather_adapters()
        with report.stage("transfer"):
            report.moved_bytes = self._rollout.set_adapters(adapters, step)
        report.survival = self._rollout.survival
        with report.stage("kv_cache"):
            self._rollout.restore_kv_cache()
        report.held_bytes = self.held_bytes()
        return report

    def to_train(self, model: str = POLICY) -> SwapReport:
        """Give the card to the trainer of `model`: the KV cache and the other models leave memory, its state returns.

        Raises: KeyError when there is no such model.
        """
        report = SwapReport(model)
        if self._config.release_kv_cache:
            with report.stage("kv_cache"):
                report.released_bytes = {"rollout/kv_cache": self._rollout.release_kv_cache()}
        with report.stage("onload"):
            report.released_bytes |= self.give(model)
        report.held_bytes = self.held_bytes()
        return report

    def give(self, model: str) -> dict[str, int]:
        """Put `model` into memory in place of the others. Returns the bytes that left, by model and kind."""
        released = self._offload(name for name in self._models if name != model)
        self._models[model].onload()
        return released

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
        if step == 0 or not self._noise.enabled:
            return Noise()
        sigma = sigma_at(step, self._run.steps, self._noise)
        return Noise(sigma, self._run.seed, step, self._noise.exempt_router)

    def held_bytes(self) -> dict[str, int]:
        """Bytes in memory now, by engine and kind."""
        held = _prefixed("rollout", self._rollout.held_bytes())
        for name, model in self._models.items():
            held |= _prefixed(name, model.held_bytes())
        return held


def _prefixed(engine: str, kinds: dict[str, int]) -> dict[str, int]:
    return {f"{engine}/{kind}": count for kind, count in kinds.items()}
