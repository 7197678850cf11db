"""The files of a checkpoint: each rank writes its own, and the meta, written last, makes the checkpoint count.

FOLDER/step_00000010/rank_00000.safetensors   rank 0: trainable parameters, Adam state, random states
FOLDER/step_00000010/adapters.safetensors     all adapters, unsharded: for other programs
FOLDER/step_00000010/meta.json                step, updates, layout, every rank's place in it, and what the caller adds

Every file appears whole (temporary name, fsync, rename). A folder without a meta is half-written: it is never read.
Ranks on several machines need a shared FOLDER.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError

META = "meta.json"
ADAPTERS = "adapters.safetensors"
POLL_SECONDS = 0.05
"""How often rank 0 looks for the files of the others."""
_NAME = re.compile(r"step_(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it still counts."""


@contextmanager
def naming(step: int) -> Iterator[None]:
    """Inside, an error of the file system says of which checkpoint: it may come up steps later."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the checkpoint of step {step} was not written: {error}") from error


def write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to the disk, and only then give it its name."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    _to_disk(temporary)
    temporary.replace(path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# ---- which there are


def step_folder(folder: str | Path, step: int) -> Path:
    return Path(folder) / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None for another name."""
    match = _NAME.match(path.name)
    return int(match[1]) if match else None


def is_complete(path: Path) -> bool:
    return (path / META).is_file()


def _step_folders(folder: str | Path) -> dict[int, Path]:
    found = {step_of(path): path for path in Path(folder).glob("step_*")}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def complete_steps(folder: str | Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return [step for step, path in _step_folders(folder).items() if is_complete(path)]


def tidy(folder: str | Path, last_step: int) -> list[int]:
    """Make way for a run that goes on after `last_step` (0: a fresh one).

    Half-written checkpoints are removed; complete ones of later steps, which this run did not take, move to FOLDER.old.
    Returns the steps that moved.
    """
    folder = Path(folder)
    moved = []
    for step, path in _step_folders(folder).items():
        if not is_complete(path):
            shutil.rmtree(path)
        elif step > last_step:
            target = folder.with_name(f"{folder.name}.old") / path.name
            target.parent.mkdir(exist_ok=True)
            _remove(target)
            path.replace(target)
            moved.append(step)
    return moved


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash in between leaves an incomplete one, never one with files missing."""
    (path / META).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


# ---- writing


def begin(folder: str | Path, step: int) -> Path:
    """Make the folder of `step` ready (rank 0, before any rank writes): what stood there counts no more."""
    target = step_folder(folder, step)
    target.mkdir(parents=True, exist_ok=True)
    for stale in (target / META, target / ADAPTERS, *target.glob("rank_*")):
        stale.unlink(missing_ok=True)
    return target


def write_rank(
    folder: str | Path,
    step: int,
    rank: int,
    tensors: Mapping[str, torch.Tensor],
    adapters: Mapping[str, torch.Tensor],
) -> None:
    """Write what rank `rank` keeps; rank 0 writes the adapters too. Needs no other rank."""
    target = step_folder(folder, step)
    if rank == 0 and adapters:
        write_durably(target / ADAPTERS, lambda path: save_tensors(path, adapters))
    write_durably(target / _rank_file(rank), lambda path: save_tensors(path, tensors))


def wait_for_ranks(folder: str | Path, step: int, ranks: int, timeout_s: float) -> None:
    """Until all ranks have written. Files, not a collective: the ranks' main threads are at the next step by now.

    Raises: CheckpointError after `timeout_s` seconds, with the files that did not appear.
    """
    target, deadline = step_folder(folder, step), time.monotonic() + timeout_s
    while missing := [_rank_file(rank) for rank in range(ranks) if not (target / _rank_file(rank)).is_file()]:
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"waited {timeout_s:.0f} s for {', '.join(missing)} in {target} (ranks on several machines need a "
                "shared folder)"
            )
        time.sleep(POLL_SECONDS)


def finish(folder: str | Path, step: int, meta: Mapping[str, Any], keep: int) -> None:
    """Make the checkpoint of `step` count (rank 0, once all ranks have written); only the newest `keep` stay."""
    text = json.dumps({"step": step, **meta}, indent=1)
    write_durably(step_folder(folder, step) / META, lambda path: _write_text(path, text))
    _to_disk(Path(folder))
    complete = complete_steps(folder)
    stay = {step, *(complete[-keep:] if keep > 0 else complete)}
    for found, path in _step_folders(folder).items():
        if found not in stay:
            _remove(path)


# ---- reading


def read_meta(folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """The meta of the checkpoint of `step`, by default of the newest complete one.

    Raises: ConfigError when there is none.
    """
    steps = complete_steps(folder)
    if not steps or (step is not None and step not in steps):
        which = "no complete checkpoint" if step is None else f"no complete checkpoint of step {step}"
        raise ConfigError(f"{folder} holds {which}.", fix="give the checkpoint folder of a run")
    path = step_folder(folder, steps[-1] if step is None else step) / META
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{META} of a checkpoint can't be read: {error}.",
            fix="remove that checkpoint folder to resume from the one before",
            where=str(path),
        ) from None


def load_rank(folder: str | Path, step: int, rank: int) -> dict[str, torch.Tensor]:
    """What `write_rank` wrote. Raises: ConfigError when the file is missing or broken."""
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
    path.write_text(text, encoding="utf-8")


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"
