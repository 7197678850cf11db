"""Samples that are cut off and go on later: the tokens of uncut ones, on one rank and on two that share experts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qerl_rl.rollout.collector import UNFINISHED
from qerl_rl.rollout.engine import GroupOutput, GroupRequest, Partial
from qerl_rl.rollout.vllm_engine import VllmEngine, sample_seed
from tests.ranks import run_engines
from tests.rollout.scenes import Plain, generate, log_prob_gaps, make_engine, plain, random_adapters, request, tokens_of

GROUPS = [0, 1, 2, 3, 4, 5]
LONGEST = 24
END = 2
Shares = list[list[int]]
"""The groups of each rank."""


def cut(whole: Plain, group: int, length: int) -> GroupRequest:
    """Group `group` with the first `length` tokens of its samples in `whole` as partial responses."""
    responses, rows, _ = whole[group]
    partials = [
        Partial(np.array(tokens[:length], np.int32), np.array(row[:length], np.float32))
        for tokens, row in zip(responses, rows, strict=True)
    ]
    return dataclasses.replace(request(group), partials=partials)


def cut_everywhere(engine: VllmEngine, whole: Plain, group: int) -> list[Plain]:
    """What follows each beginning of the group's responses, all in one rollout; in the order of their lengths."""
    lengths = range(LONGEST + 1)
    requests = [dataclasses.replace(cut(whole, group, length), group=length) for length in lengths]
    found = plain(list(engine.generate(requests, greedy=True)))
    return [{group: found[length]} for length in lengths]


def go_on(output: GroupOutput, **changes: Any) -> GroupRequest:
    partials = [Partial(*pair) for pair in zip(output.responses, output.log_probs, strict=True)]
    return dataclasses.replace(request(output.group, len(partials)), partials=partials, **changes)


def in_rounds(
    engine: VllmEngine, requests: list[GroupRequest], quota: int, rounds: int, **options: Any
) -> dict[str, Any]:
    """Rollouts that each hand out `quota` of this rank's groups and leave the others to the next one."""
    done, left = [], []
    for _ in range(rounds):
        outputs = list(engine.generate(requests, quota=min(quota, len(requests)), **options))
        done += [output for output in outputs if not output.left]
        left.append(plain([output for output in outputs if output.left]))
        requests = [go_on(output) for output in outputs if output.left]
    return {"done": plain(done), "left": left}


def _alone(folder: Path) -> dict[str, Any]:
    engine = make_engine(folder, max_sequences=32)
    engine.set_adapters(random_adapters(folder, seed=1))
    seen: dict[str, Any] = {"uncut": generate(engine, GROUPS, greedy=True)}
    seen["cut"] = {group: cut_everywhere(engine, seen["uncut"], group) for group in (0, 2)}
    uneven = [cut(seen["uncut"], group, 4 * group) for group in GROUPS]
    seen["rounds"] = in_rounds(engine, uneven, 2, 3, greedy=True)
    seen["sampled"] = [in_rounds(engine, uneven, 2, 3) for _ in range(2)]
    # Group 5 has least to do, group 0 most: it is waited for.
    forced = [dataclasses.replace(uneven[0], must_finish=True), *uneven[1:]]
    seen["forced"] = [(o.group, o.left) for o in engine.generate(forced, quota=2, greedy=True)]
    full = [cut(seen["uncut"], group, LONGEST) for group in GROUPS]
    seen["nothing to do"] = plain(list(engine.generate(full, quota=4)))
    seen["errors"] = [_error(engine, *pair) for pair in _refused(seen["uncut"])]
    seen["after"] = generate(engine, GROUPS, greedy=True)
    return seen


def _two_ranks(folder: Path, uncut: Plain, loads: list[tuple[Shares, list[int]]]) -> list[dict[str, Any]]:
    engine = make_engine(folder, data_parallel=2, expert_parallel=True)
    engine.set_adapters(random_adapters(folder, seed=1))
    rank = int(os.environ["RANK"])
    return [
        in_rounds(engine, [cut(uncut, group, 4 * group) for group in shares[rank]], quotas[rank], 3, greedy=True)
        for shares, quotas in loads
    ]


def _refused(uncut: Plain) -> list[tuple[list[GroupRequest], int]]:
    one = cut(uncut, 0, 3)
    long = Partial(np.zeros(LONGEST + 1, np.int32), np.zeros(LONGEST + 1, np.float32))
    return [
        ([dataclasses.replace(one, partials=one.partials[:1])], 1),
        ([dataclasses.replace(one, partials=[long, long])], 1),
        ([dataclasses.replace(request(group), must_finish=True) for group in (0, 1)], 1),
    ]


def _error(engine: VllmEngine, requests: list[GroupRequest], quota: int) -> str:
    try:
        list(engine.generate(requests, quota=quota))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def folder(tiny_w8a8: Callable[..., Path]) -> Path:
    return tiny_w8a8("qwen3_moe", "bfloat16")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return run_engines(_alone, 1, folder)[0]


def lengths_of(outputs: Plain) -> dict[int, list[int]]:
    return {group: [len(row) for row in responses] for group, (responses, _, _) in outputs.items()}


def test_a_response_cut_anywhere_goes_on_token_for_token(alone: dict[str, Any]) -> None:
    for group, found in alone["cut"].items():
        uncut = {group: alone["uncut"][group]}
        for length, own in enumerate(found):
            assert tokens_of(own) == tokens_of(uncut), length
            # What is prefilled instead of decoded takes other bfloat16 kernels, as another batch size does (measured:
            # up to 0.05, without any cut too).
            assert log_prob_gaps(own, uncut).max() < 0.1
        assert found[LONGEST] == uncut


def test_groups_left_by_the_quota_go_on_in_the_next_rollout(alone: dict[str, Any]) -> None:
    rounds = alone["rounds"]
    # Group g began with 4 g tokens: 5 and 4 are done after 4 and 8 more, then 3 and 2, then 1 and 0.
    assert [lengths_of(left) for left in rounds["left"]] == [
        {0: [8, 8], 1: [12, 12], 2: [16, 16], 3: [20, 20]},
        {0: [16, 16], 1: [20, 20]},
        {},
    ]
    assert list(rounds["done"]) == [5, 4, 3, 2, 1, 0]
    assert tokens_of(rounds["done"]) == tokens_of(alone["uncut"])
    for left in rounds["left"]:
        assert {reason for _, _, reasons in left.values() for reason in reasons} <= {UNFINISHED}
        for group, (responses, rows, _) in left.items():
            assert responses == [row[: len(responses[0])] for row in alone["uncut"][group][0]]
            assert [len(row) for row in rows] == [len(row) for row in responses]
    assert alone["after"] == alone["uncut"]


def test_sampled_ones_repeat_bit_for_bit_and_end_at_a_limit(alone: dict[str, Any]) -> None:
    first, second = alone["sampled"]
    assert first == second
    assert sorted(first["done"]) == GROUPS
    for responses, rows, reasons in first["done"].values():
        for response, row, reason in zip(responses, rows, reasons, strict=True):
            assert len(row) == len(response) <= LONGEST
            assert reason == ("stop" if response[-1] == END else "length")
            assert END not in response[:-1]
            assert reason == "stop" or len(response) == LONGEST
    assert tokens_of(first["done"]) != tokens_of(alone["uncut"])
    # One that goes on does not draw the numbers of its beginning again.
    assert len({sample_seed(1, index, done) for index in range(3) for done in range(5)}) == 15


def test_a_group_that_must_finish_is_waited_for(alone: dict[str, Any]) -> None:
    assert alone["forced"] == [(5, False), (0, False), (1, True), (2, True), (3, True), (4, True)]


def test_what_is_finished_already_is_handed_out_in_order(alone: dict[str, Any]) -> None:
    found = alone["nothing to do"]
    assert list(found) == GROUPS
    assert found == alone["uncut"]


def test_requests_that_can_not_go_on_are_refused(alone: dict[str, Any]) -> None:
    too_few, too_long, too_many = alone["errors"]
    assert "2 samples of at most 24 tokens have partial responses of (tokens, log_probs) [(3, 3)]" in too_few
    assert "(25, 25)" in too_long
    assert "2 groups must be among 1" in too_many


def test_ranks_that_share_experts_wait_for_each_other(folder: Path, alone: dict[str, Any]) -> None:
    loads: list[tuple[Shares, list[int]]] = [([[0, 2, 5], [1, 3, 4]], [1, 1]), ([GROUPS, []], [2, 0])]
    ranks = run_engines(_two_ranks, 2, folder, alone["uncut"], loads)
    for load, (shares, quotas) in enumerate(loads):
        for own, quota, seen in zip(shares, quotas, [rank[load] for rank in ranks], strict=True):
            assert sorted(seen["done"]) == own
            assert [len(left) for left in seen["left"]] == [max(len(own) - quota * number, 0) for number in (1, 2, 3)]
            assert tokens_of(seen["done"]) == {group: alone["uncut"][group][0] for group in seen["done"]}
