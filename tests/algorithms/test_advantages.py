import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.advantages import group_advantages


@st.composite
def grouped_rewards(draw):
    """Rewards on a grid of eighths, in 1-5 groups of 2-6 samples, shuffled."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    order = draw(st.permutations(range(len(groups))))
    rewards = draw(st.lists(st.integers(-16, 16), min_size=len(groups), max_size=len(groups)))
    return torch.tensor(rewards) / 8.0, torch.tensor([groups[position] for position in order])


def test_advantages_of_hand_computed_groups():
    rewards = torch.tensor([1.0, 5.0, 0.0, 0.0, 9.0, 1.0])
    groups = torch.tensor([7, 3, 7, 7, 3, 7])
    # Group 7: rewards 1 0 0 1, mean 1/2, sample std sqrt(1/3). Group 3: rewards 5 9, mean 7, sample std sqrt(8).
    centred = torch.tensor([0.5, -2.0, -0.5, -0.5, 2.0, 0.5])
    std = torch.tensor([3**-0.5, 8**0.5, 3**-0.5, 3**-0.5, 8**0.5, 3**-0.5])
    assert torch.equal(group_advantages(rewards, groups, normalize_std=False), centred)
    found = group_advantages(rewards, groups, normalize_std=True, eps=1e-6)
    torch.testing.assert_close(found, centred / (std + 1e-6), rtol=1e-6, atol=0)
    assert found.dtype == torch.float32


def test_equal_rewards_without_an_exact_mean_give_exactly_zero():
    advantages = group_advantages(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.int64), normalize_std=True)
    assert torch.equal(advantages, torch.zeros(7))


@settings(max_examples=60, deadline=None)
@given(grouped_rewards(), st.randoms(use_true_random=False))
def test_order_of_samples_and_names_of_groups_do_not_matter(problem, random):
    rewards, groups = problem
    order = list(range(len(rewards)))
    random.shuffle(order)
    expected = group_advantages(rewards, groups, normalize_std=True)[order]
    found = group_advantages(rewards[order], 1000 - 3 * groups[order], normalize_std=True)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(grouped_rewards(), st.integers(-8, 8))
def test_a_shift_of_all_rewards_of_a_prompt_changes_nothing(problem, shift):
    rewards, groups = problem
    for normalize in (True, False):
        expected = group_advantages(rewards, groups, normalize_std=normalize)
        shifted = group_advantages(rewards + shift * groups, groups, normalize_std=normalize)
        torch.testing.assert_close(shifted, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(grouped_rewards())
def test_each_group_has_mean_zero_and_std_one(problem):
    rewards, groups = problem
    advantages = group_advantages(rewards, groups, normalize_std=True)
    for group in groups.unique():
        own = advantages[groups == group].double()
        assert abs(own.sum().item()) < 1e-5
        if len(rewards[groups == group].unique()) > 1:
            assert own.std().item() == pytest.approx(1.0, abs=1e-4)
        else:
            assert torch.equal(own, torch.zeros_like(own))


@pytest.mark.parametrize(
    ("rewards", "groups", "reason"),
    [
        ([1.0, 2.0, 3.0], [0, 0, 5], r"\[5\] have one sample"),
        ([1.0, math.nan], [0, 0], "not finite"),
        ([1.0, 2.0], [0, 0, 0], "must both be"),
    ],
)
def test_input_without_an_advantage_is_refused(rewards, groups, reason):
    with pytest.raises(ValueError, match=reason):
        group_advantages(torch.tensor(rewards), torch.tensor(groups), normalize_std=True)
