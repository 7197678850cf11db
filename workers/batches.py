"""From leased rows of the dock to what the engines take, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from transfer_dock import Batch, Jagged, SampleKey, TransferDock

if TYPE_CHECKING:
    from qerl_rl.config.schema import RolloutConfig
    from qerl_rl.rollout.engine import GroupOutput, GroupRequest
    from qerl_rl.train.samples import Samples


def group_requests(
    batch: Batch | None, seed: int, rollout: RolloutConfig
) -> tuple[list[GroupRequest], dict[int, list[SampleKey]]]:
    """One request for each group of the lease, and the sample keys by group.

    The seed of a group follows from the run's seed, its step and its number, so that a sample does not depend on which
    rank or in which company it is drawn. Where samples are carried over, each goes on from its partial response, and a
    group of rollout.carry_max_age steps must finish.
    """
    from qerl_rl.rollout.engine import GroupRequest, Partial

    if batch is None:
        return [], {}
    rows: dict[int, list[int]] = {}
    for row, key in enumerate(batch.keys):
        rows.setdefault(key.group, []).append(row)
    requests = []
    for group, own in rows.items():
        group_seed = np.random.SeedSequence([seed, batch.keys[own[0]].step, group]).generate_state(1)[0]
        prompt = batch.columns["prompts"].row(own[0])
        request = GroupRequest(group, prompt, len(own), int(group_seed >> 1))
        if rollout.carry_prompts:
            responses, log_probs = batch.columns["partial_responses"], batch.columns["partial_log_probs"]
            experts = batch.columns.get("partial_routed_experts")
            partials = [
                Partial(responses.row(row), log_probs.row(row), None if experts is None else experts.row(row))
                for row in own
            ]
            is_old = bool(batch.columns["ages"][own[0]] >= rollout.carry_max_age)
            request = dataclasses.replace(request, partials=partials, must_finish=is_old)
        requests.append(request)
    return requests, {group: [batch.keys[row] for row in own] for group, own in rows.items()}


def to_samples(batch: Batch, columns: Sequence[str] = ()) -> Samples:
    """Prompt and response of each row as one token sequence, with the named columns spread over the response tokens.

    A stage that reads `routed_experts` has its tokens sent there.
    """
    from qerl_rl.train.samples import Samples

    prompts, responses = batch.columns["prompts"], batch.columns["responses"]
    tokens = [np.concatenate([prompts.row(row), responses.row(row)]).astype(np.int64) for row in range(len(batch.keys))]
    lengths = [len(responses.row(row)) for row in range(len(batch.keys))]
    experts = batch.columns.get("routed_experts")
    routed = None if experts is None else list(experts.rows())
    return Samples(tokens, lengths, {name: _over_tokens(batch.columns[name], lengths) for name in columns}, routed)


def _over_tokens(column: Jagged | np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    if isinstance(column, Jagged):
        return list(column.rows())
    return [np.full(length, value, dtype=np.float32) for value, length in zip(column, lengths, strict=True)]


def put_responses(dock: TransferDock, keys: list[SampleKey], output: GroupOutput) -> None:
    """Write one group into the dock, as finished or as left for the next step."""
    responses, log_probs = Jagged.from_rows(output.responses), Jagged.from_rows(output.log_probs)
    routed = {} if output.routed_experts is None else {"routed_experts": Jagged.from_rows(output.routed_experts)}
    if output.left:
        left = {f"left_{name}": column for name, column in routed.items()}
        dock.put({"left_responses": responses, "left_log_probs": log_probs, **left}, keys)
        return
    truncated = np.array([reason == "length" for reason in output.finish_reasons], dtype=np.float32)
    dock.put({"responses": responses, "rollout_log_probs": log_probs, "truncated": truncated, **routed}, keys)


def ages_of(prompts: Batch | None, keys: Sequence[SampleKey]) -> list[int]:
    """The column `ages` of some samples of a lease."""
    if prompts is None:
        return []
    ages = dict(zip(prompts.keys, prompts.columns["ages"].tolist(), strict=True))
    return [ages[key] for key in keys]
