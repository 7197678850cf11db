"""The frozen base stored once per process: the trainer's models read the rollout engine's memory where they can."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qerl_rl.reshard.ledger import mebibytes
from qerl_rl.rollout.engine import RolloutEngine
from qerl_rl.train.model_engine import ModelEngine


def share_base(rollout: RolloutEngine, models: Mapping[str, ModelEngine], give: Callable[[str], object]) -> str:
    """Let each model read what the engine lends and it has as well; returns what came of it, for the log.

    Every byte is compared first: a critic or a reward model of another checkpoint keeps its own weights.

    Args: models: of the trainer, by name, the policy first. give: puts one of them into memory in place of the others;
        the policy is there afterwards.
    """
    offered = rollout.lendable_experts()
    if not offered:
        return (
            "base stored for each engine: the rollout engine keeps none as it was loaded and in an order that is read"
        )
    given_up, different = 0, list[str]()
    for name in reversed(list(models)):
        give(name)
        adoption = models[name].adopt_experts(offered)
        rollout.lend(adoption.bytes)
        given_up += sum(adoption.bytes.values())
        different = adoption.different
    if different:
        return f"base stored for each engine: they disagree on {len(different)} weights, the first {different[0]}"
    if not given_up:
        return "base stored for each engine: no experts of this rank are whole and the same, on one device, in both"
    return f"base stored once: the trainer reads {mebibytes(given_up)} of experts in the engine's memory"
