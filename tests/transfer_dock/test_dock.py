"""The dock between real processes: what goes in comes out, once, in order, without copies it does not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray
import torch

from transfer_dock import (
    Batch,
    ColumnMismatch,
    ConflictingPut,
    DockTimeout,
    InvalidRequest,
    Jagged,
    SampleKey,
    TransferDock,
    UnknownColumn,
    UnknownConsumer,
)

MakeDock = Callable[..., TransferDock]


def keys_of(groups: range, step: int = 1, size: int = 4) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in range(size)]


def responses_of(keys: list[SampleKey]) -> list[np.ndarray]:
    return [np.arange(key.group + key.index, dtype=np.int32) + 100 * key.group for key in keys]


@ray.remote(num_cpus=0)
class Stage:
    """A process that works on batches which another one leased."""

    def sums(self, batch: Batch) -> tuple[list[SampleKey], list[int], bool]:
        responses = batch.columns["responses"]
        return list(batch.keys), [int(row.sum()) for row in responses.rows()], responses.values.flags.writeable

    def drain(self, dock: TransferDock, consumer: str, count: int, total: int) -> list[list[SampleKey]]:
        """Take and acknowledge whole groups until all consumers of this name together have had `total` samples."""
        found: list[list[SampleKey]] = []
        while dock.status()["consumers"][consumer]["acked"] < total:
            try:
                batch = dock.get(consumer, count, whole_groups=True, timeout=0.5)
            except DockTimeout:
                continue
            found.append(list(batch.keys))
            dock.ack(batch)
        return found


def test_every_kind_of_column_comes_back_as_it_was_put(make_dock: MakeDock) -> None:
    dock, keys = make_dock(), keys_of(range(2))
    experts = [np.full((length, 2, 3), length, np.uint8) for length in range(8)]
    extras = [{"id": index, "path": [1.5, None, True, b"raw", "ü"]} for index in range(8)]
    dock.put({"prompts": torch.arange(16, dtype=torch.int32).reshape(8, 2), "rewards": [0.5] * 8}, keys)
    dock.put({"responses": Jagged.from_rows(responses_of(keys)), "answers": [f"ansẅer {key}" for key in keys]}, keys)
    dock.put({"log_probs": [torch.full((key.index,), -1.0) for key in keys], "experts": experts}, keys)
    dock.put({"extras": extras}, keys)
    batch = dock.get("everything", 8)
    assert list(batch.keys) == keys
    assert "prompts" in batch.columns
    assert "promts" not in batch.columns
    assert batch.columns.get("promts") is None
    assert batch.columns.get("rewards") is batch.columns["rewards"]
    assert batch.columns["prompts"].tolist() == np.arange(16).reshape(8, 2).tolist()
    assert batch.columns["rewards"].tolist() == [0.5] * 8
    assert batch.columns["answers"] == [f"ansẅer {key}" for key in keys]
    assert batch.columns["extras"] == extras
    for got, expected in zip(batch.columns["responses"].rows(), responses_of(keys), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(batch.columns["experts"], experts, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert batch.columns["log_probs"].torch()[0].dtype == torch.float32
    assert batch.columns["log_probs"].lengths.tolist() == [key.index for key in keys]


def test_a_sample_is_ready_when_its_last_column_arrives_from_another_put(
    make_dock: MakeDock,
) -> None:
    dock, keys = make_dock(), keys_of(range(2))
    dock.put({"responses": responses_of(keys), "log_probs": [np.zeros(1, np.float32)] * 8}, keys)
    assert dock.status()["consumers"]["train"]["ready"] == 0
    backwards = keys[::-1][:5]
    dock.put({"rewards": [float(key.index) for key in backwards]}, backwards)
    batch = dock.get("train", 8, minimum=2)
    assert list(batch.keys) == sorted(backwards)
    assert batch.columns["rewards"].tolist() == [key.index for key in batch.keys]
    status = dock.status()
    assert status["consumers"]["train"] == {"ready": 0, "leased": 5, "acked": 0, "dropped": 0}
    assert status["columns"]["rewards"] == 5
    assert (status["groups_complete"]["rewards"], status["groups_complete"]["responses"]) == (1, 2)


def test_a_batch_is_read_in_another_process_without_the_driver_touching_its_payload(
    make_dock: MakeDock,
) -> None:
    dock, keys, stage = make_dock(), keys_of(range(2)), Stage.remote()
    dock.put({"responses": responses_of(keys), "log_probs": responses_of_floats(keys), "rewards": [0.0] * 8}, keys)
    batch = dock.get("train", 8)
    parts = batch.split([[2, 0, 1], [3, 4, 5, 6, 7]])
    found = ray.get([stage.sums.remote(part) for part in parts])
    sums = {key: value for part_keys, values, _ in found for key, value in zip(part_keys, values, strict=True)}
    assert sums == {key: int(row.sum()) for key, row in zip(keys, responses_of(keys), strict=True)}
    assert [writable for _, _, writable in found] == [True, False], "neighbouring rows are read in place"
    dock.ack(parts[0])
    assert dock.status()["consumers"]["train"] == {"ready": 0, "leased": 5, "acked": 3, "dropped": 0}
    dock.release(parts[1])
    assert list(dock.get("train", 5).keys) == list(parts[1].keys)
    [nothing] = batch.split([[]])
    assert (len(nothing.columns["responses"]), nothing.columns["rewards"].shape) == (0, (0,))
    dock.ack(nothing)
    with pytest.raises(InvalidRequest, match="distinct rows"):
        batch.split([[0, 1], [1]])


def responses_of_floats(keys: list[SampleKey]) -> list[np.ndarray]:
    return [row.astype(np.float32) for row in responses_of(keys)]


def test_a_contiguous_batch_is_read_in_place_and_a_put_copies_once(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["responses", "rewards"], "log": ["responses"]})
    keys = keys_of(range(4))
    values = Jagged.from_rows(responses_of(keys))
    dock.put({"responses": values, "rewards": np.zeros(16, np.float32)}, keys)
    assert dock.bytes_put == dock.bytes_copied_put == values.values.nbytes + 64
    first, rest, both = dock.get("train", 4), dock.get("train", 12), dock.get("log", 16)
    whole = both.columns["responses"].values
    assert np.shares_memory(first.columns["responses"].values, whole[: first.columns["responses"].offsets[-1]])
    assert np.shares_memory(rest.columns["responses"].values, whole)
    assert rest.columns["responses"].torch()[0].data_ptr() == rest.columns["responses"].values.ctypes.data
    assert (dock.bytes_got, dock.bytes_copied_get) == (2 * values.values.nbytes, 0)
    [scattered] = both.split([[3, 1]])
    assert scattered.columns["responses"].lengths.tolist() == [3, 1]
    assert dock.bytes_copied_get == scattered.columns["responses"].values.nbytes


def test_what_a_reader_sees_stays_while_the_dock_uses_its_memory_again(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["responses"]}, capacity_bytes=1 << 16)
    seen = []
    for step in range(1, 9):
        keys = keys_of(range(2), step)
        dock.put({"responses": [np.full(1000, step, np.int32)] * 8}, keys)
        batch = dock.get("train", 8)
        seen.append(batch.columns["responses"].values if step % 2 else batch.columns["responses"].torch()[0])
        dock.ack(batch)
    assert [set(values.tolist()) for values in seen] == [{step} for step in range(1, 9)]
    [node] = dock.status()["nodes"].values()
    assert node["highest"] > 4 * 32000, "the memory of what is looked at was left alone"


def test_memory_that_nobody_looks_at_is_used_again(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["responses"]}, capacity_bytes=1 << 20)
    for step in range(1, 9):
        dock.put({"responses": [np.full(1000, step, np.int32)] * 8}, keys_of(range(2), step))
        batch = dock.get("train", 8)
        assert batch.columns["responses"].values.sum() == 8000 * step
        dock.ack(batch)
        del batch
    [node] = dock.status()["nodes"].values()
    assert node == {"used": 0, "highest": 32000}


def test_competing_consumers_share_whole_groups_without_loss_or_doubling(
    make_dock: MakeDock,
) -> None:
    dock = make_dock(consumers={"train": ["rewards"], "log": ["rewards"]})
    stages = [Stage.remote() for _ in range(2)]
    keys = keys_of(range(30))
    drains = [stage.drain.remote(dock, "train", 8, len(keys)) for stage in stages]
    drains.append(stages[0].drain.remote(dock, "log", 4, len(keys)))
    order = np.random.default_rng(5).permutation(len(keys))
    for part in np.array_split(order, 24):
        some = [keys[row] for row in part]
        dock.put({"rewards": [float(key.group) for key in some]}, some)
    one, other, log = ray.get(drains, timeout=120)
    batches = one + other
    for batch in batches + log:
        assert all(batch.count(SampleKey(key.step, key.group, index)) == 1 for key in batch for index in range(4))
    assert sorted(key for batch in batches for key in batch) == keys
    assert sorted(key for batch in log for key in batch) == keys
    assert dock.status()["bytes_held"] == 0


def test_a_get_waits_for_its_step_only(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["rewards"]})
    for step in (1, 2):
        dock.put({"rewards": [float(step)] * 8}, keys_of(range(2), step))
    assert list(dock.get("train", 4, step=2, whole_groups=True).keys) == keys_of(range(1), step=2)
    assert [key.step for key in dock.get("train", 12).keys] == [1] * 8 + [2] * 4


def test_an_equal_repeat_is_nothing_and_another_value_a_conflict(make_dock: MakeDock) -> None:
    dock, keys = make_dock(), keys_of(range(2))
    dock.put({"responses": responses_of(keys), "rewards": [1.0] * 8}, keys)
    before = dock.status()
    dock.put({"rewards": np.ones(4, np.float32)}, keys[2:6])
    assert dock.status() == before
    with pytest.raises(ConflictingPut, match=r"'rewards' was put before with another value: step 1: group 1 \[2-3\]"):
        dock.put({"rewards": [1.0, 2.0, 2.0], "answers": ["a"] * 3}, keys[5:])
    assert dock.status() == before, "a refused put leaves nothing behind"


def wrong_calls(dock: TransferDock, keys: list[SampleKey]) -> list[tuple[type[Exception], str, Callable[[], Any]]]:
    rewards = np.zeros(8, np.float32)
    return [
        (UnknownColumn, "did you mean 'responses'", lambda: dock.put({"response": [1] * 8}, keys)),
        (UnknownConsumer, "did you mean 'train'", lambda: dock.get("trainer", 1)),
        (InvalidRequest, "multiples of samples_per_group=4", lambda: dock.get("train", 6, whole_groups=True)),
        (InvalidRequest, "minimum=3, count=2", lambda: dock.get("train", 2, minimum=3)),
        (InvalidRequest, r"keys are SampleKey\(step, group, index\)", lambda: dock.put({"rewards": [0.0]}, [(1, 2)])),
        (InvalidRequest, "appears twice", lambda: dock.put({"rewards": rewards}, keys[:4] * 2)),
        (InvalidRequest, "would have 8 samples", lambda: dock.put({"rewards": rewards}, keys_of(range(1), size=8))),
        (InvalidRequest, "can never fit", lambda: dock.put({"experts": [np.zeros(1 << 18, np.uint8)] * 8}, keys)),
        (ColumnMismatch, "fixed-size rows", lambda: dock.put({"prompts": np.zeros((8, 3), np.int32)}, keys)),
        (UnknownColumn, "for this consumer 'prompts'", lambda: dock.get("train", 1).columns["prompts"]),
    ]


def test_a_call_that_can_never_succeed_says_so_at_once(make_dock: MakeDock) -> None:
    dock, keys = make_dock(capacity_bytes=1 << 20), keys_of(range(2))
    floats = responses_of_floats(keys)
    dock.put({"prompts": responses_of(keys), "responses": responses_of(keys), "log_probs": floats}, keys)
    dock.put({"rewards": np.zeros(8, np.float32)}, keys)
    for error, message, call in wrong_calls(dock, keys):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(UnknownColumn, match=r"consumer 'train': .* did you mean 'rewards'"):
        make_dock(consumers={"train": ["reward"]})
    with pytest.raises(InvalidRequest, match="capacity_bytes=0"):
        make_dock(capacity_bytes=0)
