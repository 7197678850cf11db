from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.models import make_checkpoints
from tests.train.pool import RankPool


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a random Qwen3-MoE by quant.format: `none` (float32) and `w8a8`."""
    return make_checkpoints(Path(tmp_path_factory.mktemp("checkpoints")))


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()
