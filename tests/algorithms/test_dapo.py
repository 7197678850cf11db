"""Overlong punishment, overlong filtering, groups with signal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.advantages import group_advantages
from qerl_rl.algorithms.dapo import groups_with_signal, kept_samples, overlong_penalties


def test_the_overlong_punishment_of_hand_computed_lengths():
    lengths = torch.tensor([1, 15, 16, 17, 18, 20, 25])
    found = overlong_penalties(lengths, longest=20, buffer=4)
    assert found.tolist() == [0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 100))
def test_the_punishment_is_that_of_the_papers_three_cases(longest, buffer, length):
    buffer = min(buffer, longest)
    if length <= longest - buffer:
        expected = 0.0
    elif length <= longest:
        expected = ((longest - buffer) - length) / buffer
    else:
        expected = -1.0
    found = overlong_penalties(torch.tensor([length]), longest=longest, buffer=buffer)
    assert found.item() == pytest.approx(expected)


def test_a_buffer_beyond_the_longest_response_is_refused():
    with pytest.raises(ValueError, match=r"21 tokens is not within 0 \.\. 20"):
        overlong_penalties(torch.tensor([3]), longest=20, buffer=21)


def test_cut_off_samples_are_not_kept():
    assert kept_samples(torch.tensor([0.0, 1.0, 0.0])).tolist() == [True, False, True]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.1, 1.0])), min_size=1, max_size=20))
def test_groups_with_signal_are_those_with_an_advantage(samples):
    # Two of each, so that every group has company to compare with.
    rewards = torch.tensor([reward for _, reward in samples] * 2)
    groups = torch.tensor([group for group, _ in samples] * 2)
    advantages = group_advantages(rewards, groups, normalize_std=False)
    for group in groups.unique():
        expected = bool(advantages[groups == group].abs().max() > 0)
        assert groups_with_signal(rewards, groups)[groups == group].tolist() == [expected] * int(
            (groups == group).sum()
        )
