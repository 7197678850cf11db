"""What travels between the stages of a step, and who reads what."""

from __future__ import annotations

from pathlib import Path

from qerl_rl.config.schema import Config
from transfer_dock import TransferDock

COLUMNS = {
    "prompts": "int32",
    "prompt_texts": "str",
    "answers": "str",
    "responses": "int32",
    "response_texts": "str",
    "rollout_log_probs": "float32",
    "truncated": "float32",
    "rewards": "float32",
    "old_log_probs": "float32",
    "reference_log_probs": "float32",
    "advantages": "float32",
}

CONSUMERS = {
    "rollout": ["prompts"],
    "reward": ["prompt_texts", "responses", "answers"],
    "selection": ["rewards"],
    "advantages": [
        *("prompts", "responses", "rewards", "truncated", "prompt_texts", "response_texts", "answers"),
        *("old_log_probs", "reference_log_probs"),
    ],
    "log_probs": ["prompts", "responses", "rollout_log_probs"],
    "update": ["prompts", "responses", "truncated", "old_log_probs", "reference_log_probs", "advantages"],
}


def create_dock(config: Config, restore: Path | None = None) -> TransferDock:
    """The dock of a run; only one that may sample again selects.

    Args: restore: a file with what was left in it when a checkpoint was written.
    """
    consumers = dict(CONSUMERS)
    if config.algorithm.sampling_rounds == 1:
        del consumers["selection"]
    return TransferDock.create(
        columns=COLUMNS,
        consumers=consumers,
        samples_per_group=config.algorithm.samples_per_prompt,
        capacity_bytes=config.dock.capacity_bytes,
        timeout=config.dock.timeout_s,
        lease_timeout=max(config.fault.rollout_timeout_s, config.fault.train_timeout_s),
        restore=None if restore is None else str(restore),
    )
