"""What PPO adds: advantages against a critic, and how much the critic knows."""

import pytest
import torch

from qerl_rl.algorithms.advantages import Outcome
from qerl_rl.algorithms.losses import clipped_value_loss
from qerl_rl.algorithms.ppo import explained_variance, ppo_advantages, value_loss
from qerl_rl.config.schema import CriticConfig


def outcome(rewards, lengths, token_rewards=None):
    tokens = sum(lengths)
    return Outcome(
        torch.tensor(rewards),
        torch.arange(len(rewards)),
        torch.tensor(lengths),
        torch.zeros(tokens) if token_rewards is None else torch.tensor(token_rewards),
    )


def test_the_reward_comes_with_the_last_token_and_the_penalties_with_theirs():
    found = outcome([1.0, 2.0], [2, 3], [-0.5, 0.0, 0.0, -0.25, -0.125])
    values = torch.tensor([0.5, 1.0, 0.0, 1.0, 2.0])
    # lambda 0: delta_t = r_t + V_(t+1) - V_t, and nothing follows the last token.
    deltas = torch.tensor([-0.5 + 1.0 - 0.5, 1.0 - 1.0, 0.0 + 1.0, -0.25 + 2.0 - 1.0, 2.0 - 0.125 - 2.0])
    advantages, returns = ppo_advantages(found, values, discount=1.0, decay=0.0)
    torch.testing.assert_close(returns, deltas + values)
    torch.testing.assert_close(advantages, (deltas - deltas.mean()) / deltas.std(correction=0))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_critic_that_knows_what_comes_leaves_no_advantage(decay):
    found = outcome([1.0, -2.0, 0.5], [3, 1, 2])
    values = torch.tensor([0.25, 0.5, 1.0, -2.0, 0.25, 0.5])
    advantages, returns = ppo_advantages(found, values, discount=0.5, decay=decay)
    assert advantages.tolist() == [0.0] * 6
    torch.testing.assert_close(returns, values)
    assert explained_variance(values, returns) == 1.0


def test_advantages_are_whitened_over_all_tokens_and_the_returns_are_not():
    generator = torch.Generator().manual_seed(1)
    lengths = [5, 1, 9, 3]
    found = outcome(torch.randn(4, generator=generator).tolist(), lengths)
    values = torch.randn(18, generator=generator)
    advantages, returns = ppo_advantages(found, values, discount=1.0, decay=1.0)
    assert advantages.dtype == returns.dtype == torch.float32
    assert advantages.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert advantages.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(returns, found.rewards.repeat_interleave(found.lengths))


def test_explained_variance_of_an_offset_a_constant_and_an_opposite():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert explained_variance(returns + 3.0, returns) == pytest.approx(1.0)
    assert explained_variance(torch.full((4,), 7.0), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(4)) == 0.0
    assert explained_variance(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_value_loss_takes_its_clip_from_the_configuration():
    values, old, returns, weights = torch.tensor([[1.0, -1.0], [0.0, 0.0], [2.0, 2.0], [0.5, 2.0]])
    columns = {"values": old, "returns": returns}
    found, metrics = value_loss(CriticConfig(value_clip=0.25))(values, columns, weights)
    expected, _ = clipped_value_loss(values, old, returns, weights, clip=0.25)
    assert found == expected
    assert metrics["value_clip_fraction"] == 1.0


def test_values_within_the_clip_never_count_as_clipped():
    # old + (V - old) is V but for rounding, which must not look like a clip.
    values, old, returns = torch.randn(3, 1000, generator=torch.Generator().manual_seed(3))
    _, metrics = clipped_value_loss(values, old, returns, torch.ones(1000), clip=100.0)
    assert metrics["value_clip_fraction"] == 0.0
