"""Whole runs of launch.py, real engines in two workers, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from transfer_dock.arena import SHARED_MEMORY, sweep

ROOT = Path(__file__).parents[2]
TIMED = ("time/", "tokens_per_s/", "memory/")


def launch(config: str, model: Path, folder: Path, *arguments: str) -> str:
    """The console of a run of configs/`config` that ends well and leaves nothing in shared memory."""
    keys = [f"model.path={model}", f"run.output_dir={folder}", "checkpoint.export=false", "track.console=lines"]
    done = subprocess.run(
        [sys.executable, "launch.py", "--config", f"configs/{config}", *keys, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=420, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sweep(SHARED_MEMORY) == [], "the dock's memory"
    return done.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path: Path) -> list[dict[str, Any]]:
    """The same without what differs between two equal runs."""
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows(path)]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds, by file and name. Without Python's and numpy's generators: Ray's threads draw too."""
    files = sorted((folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    found = {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return {name: found[name] for name in found if not name.endswith(("random/numpy", "random/python"))}
