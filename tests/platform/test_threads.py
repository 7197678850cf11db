"""Pieces of work on torch's threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qerl_rl.platform.threads import on_threads


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_item_is_worked_on_once_whatever_the_threads(threads: int) -> None:
    counts = torch.zeros(20, dtype=torch.int64)
    calls: list[int] = []

    def work(items: list[int]) -> None:
        calls.append(len(items))
        for item in items:
            counts[item] += 1

    on_threads(work, range(20))
    assert counts.tolist() == [1] * 20
    # About as many for each.
    assert sorted(calls) == ([20] if threads == 1 else [6, 7, 7])
    on_threads(work, [])
    assert counts.sum() == 20


def test_each_thread_computes_alone_and_the_caller_as_before(threads: int) -> None:
    inside: list[int] = []
    weight = torch.ones(2, requires_grad=True)
    recorded: list[bool] = []

    def work(items: list[int]) -> None:
        inside.append(torch.get_num_threads())
        recorded.append((weight * 2).requires_grad)

    with torch.no_grad():
        on_threads(work, range(6))
    assert inside == [1] * threads
    assert recorded == [False] * threads
    assert torch.get_num_threads() == threads


def test_what_a_thread_raises_reaches_the_caller(threads: int) -> None:
    def work(items: list[int]) -> None:
        if 4 in items:
            raise ValueError("the fourth")

    with pytest.raises(ValueError, match="the fourth"):
        on_threads(work, range(6))
