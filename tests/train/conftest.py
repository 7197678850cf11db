from pathlib import Path

import pytest

from tests.train.models import make_checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a random Qwen3-MoE by quant.format: `none` (float32), `w8a8`, `w4a16` (scales of rows) and `nvfp4`."""
    return make_checkpoints(Path(tmp_path_factory.mktemp("checkpoints")))
