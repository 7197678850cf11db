from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.train.pool import RankPool

Ranks = Callable[..., list[Any]]


def _runner(world_size: int) -> Iterator[Ranks]:
    pool = RankPool(world_size)
    yield partial(pool.run, timeout_s=300.0)
    pool.close()


@pytest.fixture(scope="package")
def one_rank() -> Iterator[Ranks]:
    """`one_rank(function, *args)` -> [what it returned], in a process that stays."""
    yield from _runner(1)


@pytest.fixture(scope="package")
def two_ranks() -> Iterator[Ranks]:
    """`two_ranks(function, *args)` -> what it returned on each of two ranks, in processes that stay."""
    yield from _runner(2)
