"""Ways to call a dock: in an event loop, balanced, by age, by MindSpeed-RL's names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from transfer_dock import DockTimeout, InvalidRequest, SampleKey, TransferDock, UnknownColumn

MakeDock = Callable[..., TransferDock]
Until = Callable[[Callable[[], bool]], None]
ONE_CONSUMER = {"consumers": {"train": ["responses", "rewards"]}}


def keys_of(groups: range, step: int = 1) -> list[SampleKey]:
    return [SampleKey(step, group, index) for group in groups for index in range(4)]


def fill(dock: TransferDock, keys: list[SampleKey], lengths: list[int] | None = None) -> None:
    lengths = lengths or [2] * len(keys)
    rewards = [float(key.index) for key in keys]
    dock.put({"responses": [np.ones(length, np.int32) for length in lengths], "rewards": rewards}, keys)


def test_many_tasks_of_one_event_loop_share_the_samples(make_dock: MakeDock) -> None:
    dock, keys = make_dock(**ONE_CONSUMER), keys_of(range(16))

    async def consume() -> list[SampleKey]:
        batch = await dock.aget("train", 8, whole_groups=True)
        await dock.aack(batch)
        return list(batch.keys)

    async def produce(part: list[SampleKey]) -> None:
        await dock.aput({"responses": [np.ones(2, np.int32)] * 4, "rewards": np.zeros(4, np.float32)}, part)

    async def run() -> list[list[SampleKey]]:
        consumers = [asyncio.create_task(consume()) for _ in range(8)]
        await asyncio.gather(*(produce(keys[first : first + 4]) for first in range(0, 64, 4)))
        return await asyncio.gather(*consumers)

    assert sorted(key for batch in asyncio.run(run()) for key in batch) == keys


def test_a_cancelled_get_takes_nothing(make_dock: MakeDock, until: Until) -> None:
    dock, keys = make_dock(**ONE_CONSUMER), keys_of(range(1))

    async def run() -> None:
        waiting = asyncio.create_task(dock.aget("train", 4))
        await asyncio.to_thread(until, lambda: dock.status()["gets_waiting"]["train"] == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())
    until(lambda: dock.status()["gets_waiting"]["train"] == 0)
    fill(dock, keys)
    assert dock.status()["consumers"]["train"]["ready"] == 4
    assert list(dock.get("train", 4).keys) == keys


def test_ranks_get_similar_numbers_of_tokens_whoever_asks_first(make_dock: MakeDock) -> None:
    lengths = np.random.default_rng(3).lognormal(5, 0.5, 64).astype(int).tolist()
    shares = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        dock = make_dock(**ONE_CONSUMER, token_columns=["responses"])
        fill(dock, keys_of(range(16)), lengths)
        with ThreadPoolExecutor(4) as pool:
            found = {
                rank: pool.submit(dock.get, "train", 16, balance_tokens=True, rank=rank, ranks=4) for rank in order
            }
            shares.append({rank: batch.result() for rank, batch in found.items()})
    sums = [int(shares[0][rank].columns["responses"].offsets[-1]) for rank in range(4)]
    in_order = [sum(lengths[first : first + 16]) for first in range(0, 64, 16)]
    assert max(sums) < 1.01 * np.mean(sums) < max(in_order)
    assert [shares[0][rank].keys for rank in range(4)] == [shares[1][rank].keys for rank in range(4)]
    assert sorted(key for batch in shares[0].values() for key in batch.keys) == keys_of(range(16))


def test_balanced_shares_keep_groups_whole(make_dock: MakeDock) -> None:
    dock = make_dock(**ONE_CONSUMER)
    fill(dock, keys_of(range(8)), np.random.default_rng(4).integers(1, 90, 32).tolist())
    for _ in range(2):
        batch = dock.get("train", 16, whole_groups=True, balance_tokens=True)
        assert sorted(batch.keys) == keys_of_groups(sorted({key.group for key in batch.keys}))
    with pytest.raises(InvalidRequest, match="0 <= rank < ranks"):
        dock.get("train", 4, balance_tokens=True, rank=2, ranks=2)


def keys_of_groups(groups: list[int]) -> list[SampleKey]:
    return [SampleKey(1, group, index) for group in groups for index in range(4)]


def test_old_samples_wait_or_are_dropped_as_the_consumer_says(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"train": ["responses", "rewards"], "log": ["rewards"]})
    old, new = keys_of(range(1), step=1), keys_of(range(1), step=2)
    fill(dock, old)
    assert dock.close_step(1, carry_unfinished=True) == 0
    fill(dock, new)
    assert dock.status()["ages"] == {0: 1, 1: 1}
    with pytest.raises(DockTimeout, match="older than max_staleness=0"):
        dock.get("train", 8, max_staleness=0, timeout=0.2)
    fresh = dock.get("train", 4, max_staleness=0)
    assert (list(fresh.keys), fresh.ages.tolist()) == (new, [0] * 4)
    dock.release(fresh)
    assert dock.get("log", 8, max_staleness=1).ages.tolist() == [1] * 4 + [0] * 4
    assert list(dock.get("train", 4, max_staleness=0, stale="drop").keys) == new
    assert dock.status()["consumers"]["train"] == {"ready": 0, "leased": 4, "acked": 0, "dropped": 4}


def test_groups_wait_for_room_until_others_are_finished(make_dock: MakeDock, until: Until) -> None:
    dock = make_dock(**ONE_CONSUMER, capacity_groups=2)
    rewards = {"rewards": np.zeros(4, np.float32)}
    for number in range(2):
        dock.put(rewards, keys_of(range(number, number + 1)))
    with pytest.raises(DockTimeout, match=r"room for 1 group.*2 open of 2"):
        dock.put(rewards, keys_of(range(2, 3)), timeout=0.2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(dock.put, rewards, keys_of(range(2, 3)))
        until(lambda: dock.status()["puts_waiting"] == 1)
        dock.put({"responses": [np.ones(2, np.int32)] * 4}, keys_of(range(1)))
        dock.ack(dock.get("train", 4))
        waiting.result(timeout=30)
    with pytest.raises(InvalidRequest, match="capacity_groups=2"):
        dock.put({"rewards": np.zeros(12, np.float32)}, keys_of(range(5, 8)))


def test_code_written_for_mindspeed_rl_runs(make_dock: MakeDock) -> None:
    dock = make_dock(consumers={"actor_train": ["responses", "rewards", "answers"], "rule_reward": ["responses"]})
    keys = keys_of(range(2))
    assert dock.get_experience("rule_reward", ["responses"], 4) == (None, None)
    assert not dock.all_consumed("rule_reward")
    dock.put_experience({"responses": [torch.arange(key.index + 1, dtype=torch.int32) for key in keys]}, keys)
    while not dock.all_consumed("rule_reward"):
        rows, indexes = dock.get_experience("rule_reward", ["responses"], 4, use_batch_seqlen_balance=True)
        assert rows is not None
        data = {"rewards": torch.stack([row.sum() for row in rows["responses"]]).float(), "answers": ["a"] * 4}
        dock.put_experience(data, indexes)
    rows, indexes = dock.get_experience("actor_train", ["rewards", "answers"], 8)
    assert indexes == keys
    assert [float(reward) for reward in rows["rewards"]] == [0.0, 1.0, 3.0, 6.0] * 2
    assert rows["answers"] == ["a"] * 8
    with pytest.raises(UnknownColumn):
        dock.put_experience({"rm_scores": [1.0]}, keys[:1])
    dock.clear()
    assert dock.status()["samples"] == dock.status()["bytes_held"] == 0
