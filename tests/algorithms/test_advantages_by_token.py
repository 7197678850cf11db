"""Advantages beyond GRPO's: against hand-derived numbers, and against loops that follow the formulas literally."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.advantages import (
    Outcome,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
)
from qerl_rl.algorithms.choices import ADVANTAGES, advantages_by_token
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import AlgorithmConfig


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def outcomes(draw):
    """1-4 groups of 2-4 samples of 1-6 tokens, rewards and token rewards on a grid, groups in any order."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    groups = draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    count = len(groups)
    rewards = draw(st.lists(st.integers(-16, 16), min_size=count, max_size=count))
    lengths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    tokens = draw(st.lists(st.integers(-8, 8), min_size=sum(lengths), max_size=sum(lengths)))
    return Outcome(
        torch.tensor(rewards) / 8.0, torch.tensor(groups), torch.tensor(lengths), torch.tensor(tokens) / 16.0
    )


def rows_of(flat: torch.Tensor, lengths: torch.Tensor) -> list[list[float]]:
    return [part.tolist() for part in flat.split(lengths.tolist())]


def test_leave_one_out_of_a_hand_computed_group():
    # Others' means: (0 + 5) / 2, (1 + 5) / 2, (1 + 0) / 2.
    found = leave_one_out_advantages(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([4, 4, 4]))
    assert found.tolist() == pytest.approx([1.0 - 2.5, 0.0 - 3.0, 5.0 - 0.5])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes())
def test_leave_one_out_is_the_reward_less_the_mean_of_the_others(outcome):
    rewards, groups = outcome.rewards.tolist(), outcome.group_ids.tolist()
    expected = []
    for me, group in enumerate(groups):
        others = [r for other, r in enumerate(rewards) if groups[other] == group and other != me]
        expected.append(rewards[me] - statistics.mean(others))
    assert leave_one_out_advantages(outcome.rewards, outcome.group_ids).tolist() == pytest.approx(expected, abs=1e-6)


def test_reinforce_plus_plus_of_hand_computed_tokens():
    # Rewards to go with discount 1/2: sample 0 has 1 + (2 + (4 + 8)/2)/2 = 5, 2 + 12/2 = 8, 12; sample 1 has -1.
    lengths, tokens = torch.tensor([3, 1]), doubles(1.0, 2.0, 4.0, -2.0)
    found = reinforce_plus_plus_advantages(doubles(8.0, 1.0), lengths, tokens, discount=0.5)
    # Mean of 5, 8, 12, -1 is 6; squares of -1, 2, 6, -7 add up to 90.
    expected = doubles(-1.0, 2.0, 6.0, -7.0) / math.sqrt(90 / 4)
    torch.testing.assert_close(found, expected.float())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes(), st.sampled_from([1.0, 0.9, 0.0]))
def test_reinforce_plus_plus_normalizes_discounted_sums_over_the_batch(outcome, discount):
    to_go = []
    for reward, row in zip(outcome.rewards.tolist(), rows_of(outcome.token_rewards, outcome.lengths), strict=True):
        earned = [*row[:-1], row[-1] + reward]
        to_go += [
            sum(discount ** (s - t) * earned[s] for s in range(t, len(earned))) for t in range(len(earned))
        ]  # fmt: skip
    mean, std = statistics.fmean(to_go), statistics.pstdev(to_go)
    expected = [(value - mean) / std if std else 0.0 for value in to_go]
    found = reinforce_plus_plus_advantages(outcome.rewards, outcome.lengths, outcome.token_rewards, discount=discount)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes())
def test_the_baseline_variant_centres_groups_and_normalizes_over_the_batchs_tokens(outcome):
    rewards, groups = outcome.rewards.tolist(), outcome.group_ids.tolist()
    means = {g: statistics.fmean([r for r, own in zip(rewards, groups, strict=True) if own == g]) for g in set(groups)}
    tokens = [
        reward - means[group]
        for reward, group, length in zip(rewards, groups, outcome.lengths.tolist(), strict=True)
        for _ in range(length)
    ]
    mean, std = statistics.fmean(tokens), statistics.pstdev(tokens)
    expected = [(value - mean) / std if std > 1e-12 else 0.0 for value in tokens]
    found = reinforce_plus_plus_baseline_advantages(outcome.rewards, outcome.group_ids, outcome.lengths)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes(), st.sampled_from(sorted(ADVANTAGES)), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(outcome, name, random):
    order = list(range(len(outcome.rewards)))
    random.shuffle(order)
    rows = outcome.token_rewards.split(outcome.lengths.tolist())
    shuffled = Outcome(
        outcome.rewards[order], outcome.group_ids[order], outcome.lengths[order], torch.cat([rows[i] for i in order])
    )
    config = AlgorithmConfig(advantage=name)
    expected = rows_of(advantages_by_token(outcome, config), outcome.lengths)
    found = rows_of(advantages_by_token(shuffled, config), shuffled.lengths)
    for place, origin in enumerate(order):
        assert found[place] == pytest.approx(expected[origin], abs=1e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes(), st.sampled_from(sorted(ADVANTAGES)), st.integers(-8, 8))
def test_a_shift_of_all_rewards_changes_nothing(outcome, name, shift):
    config = AlgorithmConfig(advantage=name)
    shifted = Outcome(outcome.rewards + shift, outcome.group_ids, outcome.lengths, outcome.token_rewards)
    torch.testing.assert_close(
        advantages_by_token(shifted, config), advantages_by_token(outcome, config), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_equal_rewards_give_exactly_zero(name):
    outcome = Outcome(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1]), torch.tensor([1, 3, 2, 2]), torch.zeros(8))
    assert torch.equal(advantages_by_token(outcome, AlgorithmConfig(advantage=name)), torch.zeros(8))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_plus_plus_baseline"])
def test_a_penalty_on_tokens_counts_for_its_sample(name):
    config, groups, lengths = AlgorithmConfig(advantage=name), torch.tensor([0, 0, 0]), torch.tensor([2, 1, 2])
    by_token = Outcome(torch.tensor([1.0, 1.0, 0.0]), groups, lengths, torch.tensor([-0.25, -0.5, 0.0, -0.25, 0.0]))
    by_sample = Outcome(torch.tensor([0.25, 1.0, -0.25]), groups, lengths, torch.zeros(5))
    torch.testing.assert_close(advantages_by_token(by_token, config), advantages_by_token(by_sample, config))


def test_dr_grpo_is_grpo_without_its_standard_deviation():
    outcome = Outcome(
        torch.tensor([1.0, 0.0, 3.0]), torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2, 1]), torch.zeros(4)
    )
    found = {
        name: advantages_by_token(outcome, AlgorithmConfig(advantage=kind, normalize_std=std))
        for name, kind, std in [("grpo", "grpo", True), ("plain", "grpo", False), ("dr", "dr_grpo", True)]
    }
    assert torch.equal(found["dr"], found["plain"])
    expected = group_advantages(outcome.rewards, outcome.group_ids, normalize_std=True)
    assert torch.equal(found["grpo"], expected.repeat_interleave(outcome.lengths))


def test_generalized_advantages_of_hand_computed_tokens():
    rewards, values = doubles(0.0, 1.0, 2.0), doubles(0.5, 0.25, 1.0)
    found, returns = generalized_advantages(rewards, values, torch.tensor([2, 1]), discount=0.5, decay=0.5)
    # delta_0 = 0 + 0.125 - 0.5, delta_1 = 1 - 0.25, delta_2 = 2 - 1; A_0 = delta_0 + 0.25 * delta_1.
    torch.testing.assert_close(found, doubles(-0.375 + 0.1875, 0.75, 1.0))
    torch.testing.assert_close(returns, found + values)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(outcomes(), st.sampled_from([1.0, 0.9]), st.sampled_from([0.0, 0.5, 1.0]))
def test_generalized_advantages_equal_a_loop_over_each_sequence(outcome, discount, decay):
    values = torch.linspace(-1, 1, len(outcome.token_rewards), dtype=torch.float64)
    found, _ = generalized_advantages(
        outcome.token_rewards.double(), values, outcome.lengths, discount=discount, decay=decay
    )
    expected = []
    rows = zip(rows_of(outcome.token_rewards, outcome.lengths), rows_of(values, outcome.lengths), strict=True)
    for rewards, own in rows:
        last, backwards = 0.0, []
        for t in reversed(range(len(rewards))):
            following = own[t + 1] if t + 1 < len(own) else 0.0
            last = rewards[t] + discount * following - own[t] + discount * decay * last
            backwards.append(last)
        expected += backwards[::-1]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_with_decay_one_the_returns_are_discounted_rewards_whatever_the_critic_says():
    rewards, lengths = doubles(1.0, 2.0, 4.0, 8.0), torch.tensor([3, 1])
    for values in (torch.zeros(4).double(), doubles(3.0, -1.0, 2.0, 7.0)):
        _, returns = generalized_advantages(rewards, values, lengths, discount=0.5, decay=1.0)
        torch.testing.assert_close(returns, doubles(1.0 + 1.0 + 1.0, 2.0 + 2.0, 4.0, 8.0))


def test_values_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"must both be \[3\]"):
        generalized_advantages(torch.zeros(4), torch.zeros(4), torch.tensor([2, 1]), discount=1.0, decay=1.0)
    with pytest.raises(ValueError, match=r"token_rewards \[3\] don't fit"):
        reinforce_plus_plus_advantages(torch.zeros(2), torch.tensor([2, 2]), torch.zeros(3), discount=1.0)
    with pytest.raises(ValueError, match="1 of 2 rewards are not finite"):
        reinforce_plus_plus_advantages(
            torch.tensor([0.0, math.inf]), torch.tensor([1, 1]), torch.zeros(2), discount=1.0
        )


def first_reward_everywhere(outcome: Outcome, config: AlgorithmConfig) -> torch.Tensor:
    return outcome.rewards[:1]


def not_a_number(outcome: Outcome, config: AlgorithmConfig) -> torch.Tensor:
    return outcome.rewards * math.nan


@pytest.mark.parametrize(
    ("function", "reason"),
    [("first_reward_everywhere", r"gave \[1\] for 2 samples, 5 tokens"), ("not_a_number", "2 adv")],
)
def test_what_an_own_function_gives_is_checked(function, reason):
    outcome = Outcome(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]), torch.tensor([2, 3]), torch.zeros(5))
    with pytest.raises(ConfigError, match=reason):
        advantages_by_token(outcome, AlgorithmConfig(advantage=f"tests.algorithms.test_advantages_by_token.{function}"))
