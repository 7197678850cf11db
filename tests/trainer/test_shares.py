"""Rows reach ranks and mini-batches whole, once, and the same way every time."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.shares import even_rows, group_rows, kept_rows, mini_batch_rows
from transfer_dock import SampleKey


def keys_of(groups, size):
    return [SampleKey(3, group, index) for group in range(groups) for index in range(size)]


@given(st.integers(0, 50), st.integers(1, 8))
def test_every_row_goes_to_one_rank_and_shares_differ_by_one_at_most(count, parts):
    rows = even_rows(count, parts)
    assert sorted(row for part in rows for row in part) == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_groups_stay_whole_on_one_rank(groups, size, parts):
    keys = keys_of(groups, size)
    rows = group_rows(keys, parts)
    assert sorted(row for part in rows for row in part) == list(range(len(keys)))
    owners = {}
    for rank, part in enumerate(rows):
        for row in part:
            owners.setdefault(keys[row].group, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in owners.values())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 4), st.integers(1, 3), st.integers(0, 9))
def test_each_epoch_uses_every_sample_once_in_whole_groups(per_mini_batch, mini_batches, size, epochs, seed):
    keys = keys_of(per_mini_batch * mini_batches, size)
    updates = mini_batch_rows(keys, per_mini_batch, epochs, np.random.default_rng(seed))
    again = mini_batch_rows(keys, per_mini_batch, epochs, np.random.default_rng(seed))
    assert updates == again
    assert len(updates) == mini_batches * epochs
    for epoch in range(epochs):
        part = updates[epoch * mini_batches : (epoch + 1) * mini_batches]
        assert sorted(row for rows in part for row in rows) == list(range(len(keys)))
        for rows in part:
            assert len({keys[row].group for row in rows}) == per_mini_batch
            assert len(rows) == per_mini_batch * size


def test_updates_lose_the_rows_that_are_not_kept_and_vanish_without_any():
    updates = [[4, 0, 1], [2, 3], [5, 2]]
    assert kept_rows(updates, [True, False, False, False, True, True]) == [[4, 0], [5]]
    assert kept_rows(updates, [False] * 6) == []
