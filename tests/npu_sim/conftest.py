"""Processes that the tests of the simulated NPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def two_simulated() -> Iterator[RankPool]:
    """As `two_ranks`, in processes of their own: what asks for npu-sim there changes torch for good."""
    with RankPool(2) as pool:
        yield pool
