"""The quickstart's model, and runs of launch files on it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qerl_rl.make_model.tiny import make_tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny W8A8 model that `make quickstart` trains: it knows more sums than it gets right (30 %)."""
    folder = tmp_path_factory.mktemp("quickstart_model")
    make_tiny(folder)
    return folder


@pytest.fixture
def trained(quickstart_model: Path, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """`trained("grpo_quickstart_cpu.yaml", "run.steps=4", ...)` -> the metrics of each step of that run."""

    def run(config: str, *overrides: str) -> list[dict[str, float]]:
        keys = [f"model.path={quickstart_model}", f"run.output_dir={tmp_path}", "checkpoint.export=false", *overrides]
        done = subprocess.run(
            [sys.executable, "launch.py", "--config", f"configs/{config}", *keys],
            cwd=ROOT, capture_output=True, text=True, timeout=420, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    return run
