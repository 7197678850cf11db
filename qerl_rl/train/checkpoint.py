"""Sharded checkpoints of the train state: each rank writes its own file, and the meta, written last, makes it count.

FOLDER/step_00000010/rank_00000.safetensors   rank 0: trainable parameters, Adam state, random state
FOLDER/step_00000010/adapters.safetensors     all adapters, unsharded: any other layout can start from them
FOLDER/step_00000010/meta.json                step, updates and layout; written last

Ranks on several machines need a shared FOLDER.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError

META = "meta.json"
ADAPTERS = "adapters.safetensors"
_NAME = re.compile(r"step_(\d{8})$")


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, and only then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    for target in (temporary, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        if target is temporary:
            temporary.replace(path)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def step_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = [(_NAME.match(path.name), path) for path in Path(folder).glob("step_*")]
    return sorted(int(match[1]) for match, path in found if match and (path / META).is_file())


def save_rank(
    folder: str | Path,
    step: int,
    rank: int,
    tensors: Mapping[str, torch.Tensor],
    adapters: Mapping[str, torch.Tensor],
    barrier: Callable[[], None],
) -> None:
    """Write what rank `rank` keeps; rank 0 writes the adapters too. Collective through `barrier`.

    A checkpoint of this step that is there already stops counting first, so a crash never leaves a mixture.
    """
    target = step_folder(folder, step)
    if rank == 0:
        target.mkdir(parents=True, exist_ok=True)
        (target / META).unlink(missing_ok=True)
    barrier()
    write_durably(target / _rank_file(rank), lambda path: save_tensors(path, tensors))
    if rank == 0 and adapters:
        write_durably(target / ADAPTERS, lambda path: save_tensors(path, adapters))
    barrier()


def finish(folder: str | Path, step: int, meta: Mapping[str, Any], keep: int) -> None:
    """Make the checkpoint of `step` count (rank 0, once all ranks have written); only the newest `keep` stay."""
    text = json.dumps({"step": step, **meta}, indent=1)
    write_durably(step_folder(folder, step) / META, lambda path: _write_text(path, text))
    complete = complete_steps(folder)
    stay = {step, *(complete[-keep:] if keep > 0 else complete)}
    for path in Path(folder).glob("step_*"):
        match = _NAME.match(path.name)
        if match and int(match[1]) not in stay:
            shutil.rmtree(path)


def load_meta(folder: str | Path, layout: Mapping[str, Any]) -> dict[str, Any]:
    """The meta of the newest complete checkpoint.

    Raises: ConfigError when there is none, or when it was written by another layout than `layout`.
    """
    steps = complete_steps(folder)
    if not steps:
        raise ConfigError(f"{folder} holds no complete checkpoint.", fix="give the checkpoint folder of a run")
    target = step_folder(folder, steps[-1])
    meta = json.loads((target / META).read_text())
    written = meta["layout"]
    different = [key for key in layout if written.get(key) != layout[key]]
    if different:
        pairs = ", ".join(f"{key}={written.get(key)} (now {layout[key]})" for key in different)
        raise ConfigError(
            f"the checkpoint was written with {pairs}.",
            fix=f"resume with the layout it was written with, or start anew from {target / ADAPTERS}",
            where=str(target),
        )
    return meta


def load_rank(folder: str | Path, step: int, rank: int) -> dict[str, torch.Tensor]:
    """What `save_rank` wrote. Raises: ConfigError when the file is missing or broken."""
    path = step_folder(folder, step) / _rank_file(rank)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path.name} of checkpoint step {step} can't be read: {error}.",
            fix="remove that checkpoint folder to resume from the one before",
            where=str(path),
        ) from None


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
