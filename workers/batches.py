"""From leased rows of the dock to what the engines take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from transfer_dock import Batch, Jagged, SampleKey

if TYPE_CHECKING:
    from qerl_rl.rollout.engine import GroupRequest
    from qerl_rl.train.samples import Samples


def group_requests(batch: Batch | None, seed: int) -> tuple[list[GroupRequest], dict[int, list[SampleKey]]]:
    """One request for each group of the lease, and the sample keys by group.

    The seed of a group follows from the run's seed, its step and its number, so that a sample does not depend on which
    rank or in which company it is drawn.
    """
    from qerl_rl.rollout.engine import GroupRequest

    if batch is None:
        return [], {}
    prompts = batch.columns["prompts"]
    keys: dict[int, list[SampleKey]] = {}
    requests = []
    for row, key in enumerate(batch.keys):
        keys.setdefault(key.group, []).append(key)
        if len(keys[key.group]) == 1:
            group_seed = np.random.SeedSequence([seed, key.step, key.group]).generate_state(1)[0]
            requests.append((key.group, prompts.row(row), int(group_seed >> 1)))
    return [GroupRequest(group, prompt, len(keys[group]), seed) for group, prompt, seed in requests], keys


def to_samples(batch: Batch, columns: Sequence[str] = ()) -> Samples:
    """Prompt and response of each row as one token sequence, with the named columns spread over the response tokens."""
    from qerl_rl.train.samples import Samples

    prompts, responses = batch.columns["prompts"], batch.columns["responses"]
    tokens = [np.concatenate([prompts.row(row), responses.row(row)]).astype(np.int64) for row in range(len(batch.keys))]
    lengths = [len(responses.row(row)) for row in range(len(batch.keys))]
    return Samples(tokens, lengths, {name: _over_tokens(batch.columns[name], lengths) for name in columns})


def _over_tokens(column: Jagged | np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    if isinstance(column, Jagged):
        return list(column.rows())
    return [np.full(length, value, dtype=np.float32) for value, length in zip(column, lengths, strict=True)]
