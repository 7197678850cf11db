"""Whole runs of launch.py, real engines in two workers, and what they leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.shared_memory import dock_files

ROOT = Path(__file__).parents[2]
TIMED = ("time/", "tokens_per_s/", "memory/")


def launch(config: str, model: Path, folder: Path, *arguments: str) -> str:
    """The console of a run of configs/`config` that ends well and leaves nothing in shared memory."""
    keys = [f"model.path={model}", f"run.output_dir={folder}", "checkpoint.export=false", "track.console=lines"]
    return finished([sys.executable, "launch.py", "--config", f"configs/{config}", *keys, *arguments])


def finished(command: list[str], environment: dict[str, str] | None = None) -> str:
    """The console of a program that ends well, within seven minutes, and leaves nothing in shared memory."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=420)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:] + errors[-3000:]
    assert dock_files(process.pid) == [], "the dock's memory"
    return output


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
