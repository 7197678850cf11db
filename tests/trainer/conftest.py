"""The quickstart's model, and runs of launch files on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qerl_rl.make_model.tiny import make_tiny
from tests.trainer.runs import launch, rows


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny W8A8 model that `make quickstart` trains: it knows more sums than it gets right (30 %)."""
    folder = tmp_path_factory.mktemp("quickstart_model")
    make_tiny(folder)
    return folder


@pytest.fixture
def trained(quickstart_model: Path, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """`trained("dapo_quickstart_cpu.yaml", "run.steps=4", ...)` -> the metrics of each step of that run."""

    def run(config: str, *overrides: str) -> list[dict[str, float]]:
        launch(config, quickstart_model, tmp_path, *overrides)
        return rows(tmp_path / "metrics.jsonl")

    return run
