"""Engines with a value head on the policy's cards: the critic, and a reward model that only judges."""

from __future__ import annotations

import dataclasses

import numpy as np

from qerl_rl.config.schema import Config
from qerl_rl.layout.slots import VALUE
from qerl_rl.platform.state_store import StateStore
from qerl_rl.quant.checkpoint import stored_format
from qerl_rl.train.learner import LearningEngine
from qerl_rl.train.model_engine import ModelEngine
from qerl_rl.train.packing import at_ends
from qerl_rl.train.samples import Samples


class ValueEngine(LearningEngine):
    """The critic: adapters over the frozen model at critic.path (empty: model.path) and a value head beside them.

    `update` calls loss_function(values [T], columns, token_weights).

    Args: config: the launch configuration; critic.learning_rate and critic.warmup_steps take the place of the policy's.
    """

    prefix = "critic/"

    def __init__(self, config: Config, store: StateStore | None = None) -> None:
        critic = config.critic
        own = dataclasses.replace(config.train, learning_rate=critic.learning_rate, warmup_steps=critic.warmup_steps)
        config = with_model(dataclasses.replace(config, train=own), critic.path or config.model.path)
        super().__init__(config, store, head=VALUE)
        from qerl_rl.train.passes import Passes, value_scores

        self._passes = Passes(self._state.ddp, value_scores)

    def values(self, samples: Samples) -> list[np.ndarray] | None:
        """V of the state before each response token: per sample float32 [response_length]; None off `is_output_rank`.

        V is what the critic expects of prompt and response up to there, the token itself not yet seen.
        """
        self._require_parameters("values")
        found = self._scores(self._packs(samples), len(samples))
        return None if found is None else found[0]


class RewardModelEngine(ModelEngine):
    """The reward model at reward_model.path, frozen: a HF model for sequence classification with one label."""

    def __init__(self, config: Config, store: StateStore | None = None) -> None:
        no_adapters = dataclasses.replace(config.lora, rank=0)
        config = with_model(dataclasses.replace(config, lora=no_adapters), config.reward_model.path)
        super().__init__(config, store, head=VALUE)
        self.model.requires_grad_(requires_grad=False)
        from qerl_rl.train.passes import Passes, value_scores

        self._passes = Passes(self.model, value_scores)

    def scores(self, samples: Samples) -> np.ndarray | None:
        """The head at each sample's last token, after prompt and response: float32 [S]; None off `is_output_rank`."""
        self._require_parameters("scores")
        packs = [at_ends(pack) for pack in self._packs(samples)]
        found = self._scores(packs, len(samples))
        return None if found is None else np.concatenate([np.zeros(0, np.float32), *found[0]])


def with_model(config: Config, path: str) -> Config:
    """The configuration of an engine for the model at `path`, whose weights may be stored in another way."""
    model = dataclasses.replace(config.model, path=path)
    return dataclasses.replace(config, model=model, quant=dataclasses.replace(config.quant, format=stored_format(path)))
