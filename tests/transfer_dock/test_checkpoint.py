"""A dock saved to a file is the same dock again: what waits still waits, what was consumed stays consumed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import transfer_dock.checkpoint
from transfer_dock import DockError, InvalidRequest, Jagged, LeaseLost, SampleKey, StepClosed, TransferDock

MakeDock = Callable[..., TransferDock]
CONSUMERS = {"train": ["responses", "answers"], "log": ["responses"]}


def keys_of(groups: range, step: int = 1) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in range(4)]


def columns_of(keys: list[SampleKey]) -> dict[str, object]:
    return {
        "responses": [np.arange(key.group + 5 * key.index, dtype=np.int32) + key.step for key in keys],
        "answers": [f"answer {key}" for key in keys],
    }


@pytest.fixture
def used(make_dock: MakeDock) -> TransferDock:
    """A closed step, a carried group, finished, leased, and incomplete samples."""
    dock = make_dock(consumers=CONSUMERS)
    for groups in (range(2), range(2, 3), range(3, 6)):
        dock.put(columns_of(keys_of(groups)), keys_of(groups))
    for consumer in ("train", "log"):
        dock.ack(dock.get(consumer, 8))
    dock.close_step(1, carry_unfinished=True)
    dock.close_step(0, carry_unfinished=False)
    later = keys_of(range(3), step=2)
    dock.put({"responses": columns_of(later)["responses"]}, later)
    dock.ack(dock.get("log", 6))
    return dock


def test_a_restored_dock_goes_on_where_the_saved_one_was(
    used: TransferDock, make_dock: MakeDock, tmp_path: Path
) -> None:
    leased = used.get("train", 4)
    size = used.save(str(tmp_path / "checkpoint" / "dock"))
    assert size == (tmp_path / "checkpoint" / "dock").stat().st_size
    assert os.listdir(tmp_path / "checkpoint") == ["dock"]
    used.release(leased)
    again = make_dock(consumers=CONSUMERS, restore=str(tmp_path / "checkpoint" / "dock"))
    before, after = used.status(), again.status()
    assert {name: after[name] for name in before if name != "nodes"} == {n: before[n] for n in before if n != "nodes"}
    with pytest.raises(StepClosed):
        again.put(columns_of(keys_of(range(1))), keys_of(range(1)))
    with pytest.raises(StepClosed):
        again.put(columns_of(keys_of(range(1), step=0)), keys_of(range(1), step=0))
    with pytest.raises(LeaseLost):
        again.ack(leased)
    later = keys_of(range(3), step=2)
    for dock in (used, again):
        dock.put({"answers": columns_of(later)["answers"]}, later)
        for consumer, count in (("train", 28), ("log", 22)):
            batch = dock.get(consumer, count)
            wanted = columns_of(list(batch.keys))
            assert all(map(np.array_equal, batch.columns["responses"], wanted["responses"]))
            if consumer == "train":
                assert batch.columns["answers"] == wanted["answers"]
                assert batch.ages.tolist() == [1 if key.step == 1 else 0 for key in batch.keys]
            dock.ack(batch)
        assert dock.status()["bytes_held"] == 0


def test_a_dock_saves_while_it_is_written_and_read(used: TransferDock, make_dock: MakeDock, tmp_path: Path) -> None:
    """What is finished while it is being saved is not written over before the file has it."""
    path, write = str(tmp_path / "dock"), transfer_dock.checkpoint._write
    seen = {}

    def write_late(*args: object) -> int:
        seen["status"] = used.status()
        for step in (1, 2):
            used.close_step(step, carry_unfinished=False)
        keys = keys_of(range(6), step=3)
        used.put({"responses": [np.full(40, 9, np.int32)] * 24, "answers": ["b"] * 24}, keys)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer_dock.checkpoint, "_write", write_late)
        used.save(path)
    again = make_dock(consumers=CONSUMERS, restore=path)
    assert again.status()["samples"] == seen["status"]["samples"]
    batch = again.get("train", 16)
    assert all(map(np.array_equal, batch.columns["responses"], columns_of(list(batch.keys))["responses"]))


def test_a_file_that_cannot_be_restored_says_why(used: TransferDock, make_dock: MakeDock, tmp_path: Path) -> None:
    path = tmp_path / "dock"
    used.save(str(path))
    with pytest.raises(InvalidRequest, match=r"samples_per_group=4, here 2"):
        make_dock(consumers=CONSUMERS, samples_per_group=2, restore=str(path))
    with pytest.raises(InvalidRequest, match="consumers"):
        make_dock(consumers={"train": ["responses"]}, restore=str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DockError, match="no saved dock, or was cut off"):
        make_dock(consumers=CONSUMERS, restore=str(path))
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DockError, match="damaged"):
        make_dock(consumers=CONSUMERS, restore=str(path))
    with pytest.raises(FileNotFoundError):
        make_dock(consumers=CONSUMERS, restore=str(tmp_path / "other"))


def test_a_save_that_fails_leaves_the_file_before_it(used: TransferDock, tmp_path: Path) -> None:
    path = tmp_path / "dock"
    used.save(str(path))
    before = path.read_bytes()
    used.put({"responses": Jagged.from_rows([np.ones(1000, np.int32)] * 4)}, keys_of(range(1), step=7))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            used.save(str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["dock"]
    used.save(str(path))
    assert path.read_bytes() != before
