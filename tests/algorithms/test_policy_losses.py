"""Every policy loss: by hand, by finite differences, by properties that must hold for all of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.choices import LOSSES
from qerl_rl.algorithms.grpo import grpo_loss
from qerl_rl.algorithms.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    clipped_weight_policy_loss,
    dual_clip_policy_loss,
    sequence_policy_loss,
)
from qerl_rl.algorithms.sequences import AGGREGATIONS, sequence_ids, token_weights
from qerl_rl.config.schema import AlgorithmConfig


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def problem(seed: int, lengths: list[int], spread: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """log_probs, entropy and columns of sequences with one advantage each."""
    generator, tokens = torch.Generator().manual_seed(seed), sum(lengths)

    def normal(count: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(count, generator=generator, dtype=torch.float64)

    log_probs = -1.5 + normal(tokens, 0.3)
    sizes = torch.tensor(lengths)
    columns = {
        "old_log_probs": log_probs + normal(tokens, spread),
        "advantages": normal(len(lengths), 1.0).repeat_interleave(sizes),
        "reference_log_probs": log_probs + normal(tokens, 0.5),
        "sequence_ids": sequence_ids(sizes),
    }
    return log_probs, 1.0 + normal(tokens, 0.2), columns


def config_of(loss: str, **named) -> AlgorithmConfig:
    return AlgorithmConfig(loss=loss, clip_low=0.2, clip_high=0.28, dual_clip=1.5, **named)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "stopped"),
    [
        (5.0, -2.0, 6.0, 0.0, 1.0),  # stopped at dual_clip * 2
        (2.9, -2.0, 5.8, 5.8, 0.0),
        (0.5, -2.0, 1.6, 0.0, 0.0),  # the lower clip is PPO's
        (5.0, 2.0, -2.6, 0.0, 0.0),  # a good token is PPO's too
    ],
)
def test_dual_clip_bounds_what_a_bad_token_costs(ratio, advantage, loss, gradient, stopped):
    log_probs = doubles(ratio).log().requires_grad_()
    found, metrics = dual_clip_policy_loss(
        log_probs, doubles(0.0), doubles(advantage), doubles(1.0), clip_low=0.2, clip_high=0.3, dual_clip=3.0
    )
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert log_probs.grad.item() == pytest.approx(gradient)
    assert metrics["dual_clip_fraction"].item() == stopped
    assert metrics["clip_fraction"].item() == float(gradient == 0.0)


@pytest.mark.parametrize(
    ("ratio", "weight", "clipped"), [(1.0, 1.0, 0.0), (1.2, 1.2, 0.0), (4.0, 1.3, 1.0), (0.25, 0.8, 1.0)]
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_clips_the_weight_and_keeps_the_gradient(ratio, weight, clipped, advantage):
    log_probs = (doubles(ratio).log() - 1.0).requires_grad_()
    found, metrics = clipped_weight_policy_loss(
        log_probs, doubles(-1.0), doubles(advantage), doubles(1.0), clip_low=0.2, clip_high=0.3
    )
    found.backward()
    assert found.item() == pytest.approx(-weight * advantage * (math.log(ratio) - 1.0))
    assert log_probs.grad.item() == pytest.approx(-weight * advantage)
    assert metrics["clip_fraction"].item() == clipped
    assert metrics["ratio"].item() == pytest.approx(ratio)


def test_gspo_of_hand_computed_sequences():
    # Log ratios: sequence 0 has ln 4 and 0, so s = 2; sequence 1 has ln 0.5, so s = 0.5.
    log_probs = doubles(math.log(4), 0.0, math.log(0.5)).requires_grad_()
    advantages, weights = doubles(-1.0, -1.0, 3.0), doubles(0.5, 0.5, 1.0)
    loss, metrics = sequence_policy_loss(
        log_probs, torch.zeros(3).double(), advantages, weights, torch.tensor([0, 0, 1]), clip_low=0.2, clip_high=0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(2.0 - 1.5)
    # d/d log p of |y|-mean: s * (-A) / |y|, on each token alike.
    torch.testing.assert_close(log_probs.grad, doubles(1.0, 1.0, -1.5))
    assert metrics["ratio"].item() == pytest.approx(2.0 + 2.0 + 0.5)
    assert metrics["clip_fraction"].item() == 0.0


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_gspo_drops_the_gradient_of_a_whole_sequence(ratio, advantage):
    log_probs = torch.full((3,), math.log(ratio), dtype=torch.float64).requires_grad_()
    zeros, ids = torch.zeros(3).double(), torch.zeros(3, dtype=torch.int64)
    advantages = torch.full((3,), advantage).double()
    loss, metrics = sequence_policy_loss(log_probs, zeros, advantages, zeros + 1 / 3, ids, clip_low=0.2, clip_high=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-advantage * (1 + 0.2 * math.copysign(1, ratio - 1)))
    assert torch.equal(log_probs.grad, zeros)
    assert metrics["clip_fraction"].item() == 3.0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_gspo_equals_its_sequence_objective_and_gradient(seed, lengths):
    """Against eq. 5 written with one differentiable ratio a sequence, no stop-gradient anywhere."""
    log_probs, _, columns = problem(seed, lengths)
    log_probs.requires_grad_()
    weights, count = token_weights(torch.tensor(lengths), "sequence_mean", 1)
    found, _ = LOSSES["gspo"](log_probs, columns, weights.double(), config_of("gspo"))
    (gradient,) = torch.autograd.grad(found / count, log_probs)
    objective = torch.zeros((), dtype=torch.float64)
    begin = 0
    for length in lengths:
        own = slice(begin, begin + length)
        ratio = (log_probs[own] - columns["old_log_probs"][own]).mean().exp()
        advantage = columns["advantages"][begin]
        objective = objective + torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        begin += length
    expected = -objective / count
    assert (found / count).item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, log_probs)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", ["ppo", "dual_clip", "gspo"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_equal_finite_differences(loss, aggregation):
    lengths = [4, 1, 6]
    log_probs, entropy, columns = problem(5, lengths)
    weights, _ = token_weights(torch.tensor(lengths), aggregation, 7)
    function = grpo_loss(config_of(loss, kl_coefficient=0.3, entropy_coefficient=0.05))
    assert torch.autograd.gradcheck(
        lambda p, h: function(p, h, columns, weights.double())[0],
        (log_probs.requires_grad_(), entropy.requires_grad_()),
    )


def test_the_gradient_of_cispo_equals_finite_differences_with_its_weights_held_fixed():
    log_probs, _, columns = problem(6, [4, 1, 6])
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1)).double()
    held = (log_probs - columns["old_log_probs"]).exp().clamp(0.8, 1.28)
    leaf = log_probs.clone().requires_grad_()
    loss, _ = LOSSES["cispo"](leaf, columns, weights, config_of("cispo"))
    (found,) = torch.autograd.grad(loss, leaf)

    def fixed(values: torch.Tensor) -> torch.Tensor:
        return -(weights * held * columns["advantages"] * values).sum()

    step = 1e-5
    for token in range(11):
        change = torch.zeros(11).double()
        change[token] = step
        slope = (fixed(log_probs + change) - fixed(log_probs - change)) / (2 * step)
        assert found[token].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_on_policy_every_loss_has_the_gradient_of_reinforce(loss):
    log_probs, entropy, columns = problem(8, [3, 5, 2])
    columns["old_log_probs"] = log_probs.clone()
    weights, _ = token_weights(torch.tensor([3, 5, 2]), "sequence_mean", 1)
    log_probs.requires_grad_()
    grpo_loss(config_of(loss))(log_probs, entropy, columns, weights.double())[0].backward()
    torch.testing.assert_close(log_probs.grad, -weights.double() * columns["advantages"])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(LOSSES)),
    st.sampled_from(AGGREGATIONS),
    st.integers(0, 10_000),
    st.lists(st.integers(1, 5), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_any_split_and_order_of_samples_gives_the_same_loss_gradient_and_metrics(
    loss, aggregation, seed, lengths, random
):
    log_probs, entropy, columns = problem(seed, lengths)
    config = config_of(loss, kl_coefficient=0.1, entropy_coefficient=0.01)
    function, bounds = grpo_loss(config), [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def evaluate(parts: list[list[int]]) -> tuple[float, torch.Tensor, dict[str, float]]:
        leaf, total, normalizer, sums = log_probs.clone().requires_grad_(), torch.zeros(()).double(), 0, {}
        for part in parts:
            tokens = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in part])
            own_lengths = torch.tensor([lengths[s] for s in part])
            weights, count = token_weights(own_lengths, aggregation, 9)
            own = {name: column[tokens] for name, column in columns.items()} | {
                "sequence_ids": sequence_ids(own_lengths)
            }
            part_loss, metrics = function(leaf[tokens], entropy[tokens], own, weights.double())
            total, normalizer = total + part_loss, normalizer + count
            sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
        total = total / normalizer
        return total.item(), torch.autograd.grad(total, leaf)[0], sums

    order = list(range(len(lengths)))
    random.shuffle(order)
    cut = random.randrange(1, len(order))
    whole = evaluate([list(range(len(lengths)))])
    for parts in ([[s] for s in range(len(lengths))], [order[:cut], order[cut:]]):
        found = evaluate(parts)
        assert found[0] == pytest.approx(whole[0], rel=1e-6, abs=1e-7)
        torch.testing.assert_close(found[1], whole[1], rtol=1e-6, atol=1e-8)
        assert found[2] == pytest.approx(whole[2], rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_token_of_no_weight_changes_nothing(loss):
    """What pads a sequence of its own, or is masked, neither pulls nor counts."""
    log_probs, _, columns = problem(9, [3, 2])
    weights = doubles(1.0, 1.0, 1.0, 0.0, 0.0)
    alone = {name: column[:3] for name, column in columns.items()}
    kept, padded = (log_probs[:3].clone().requires_grad_(), log_probs.clone().requires_grad_())
    first, _ = LOSSES[loss](kept, alone, weights[:3], config_of(loss))
    second, _ = LOSSES[loss](padded, columns, weights, config_of(loss))
    first.backward()
    second.backward()
    assert first.item() == pytest.approx(second.item())
    torch.testing.assert_close(padded.grad[:3], kept.grad)
    assert torch.equal(padded.grad[3:], torch.zeros(2).double())


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_absurd_tokens_give_finite_losses_and_gradients(loss):
    log_probs = torch.tensor([0.0, -3000.0, 0.0, -3000.0], requires_grad=True)
    columns = {
        "old_log_probs": torch.tensor([-3000.0, 0.0, -3000.0, 0.0]),
        "advantages": torch.tensor([-1.0, -1.0, 1.0, 1.0]),
        "sequence_ids": torch.arange(4),
    }
    value, metrics = LOSSES[loss](log_probs, columns, torch.ones(4), config_of(loss))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(log_probs.grad).all()
    assert all(torch.isfinite(metric) and not metric.requires_grad for metric in metrics.values())


def test_token_weights_of_hand_computed_lengths():
    lengths = torch.tensor([2, 4])
    expected = {
        "token_mean": ([1.0] * 6, 6),
        "sequence_mean": ([0.5, 0.5, 0.25, 0.25, 0.25, 0.25], 2),
        "sequence_sum_constant": ([0.125] * 6, 2),
    }
    for aggregation, (weights, normalizer) in expected.items():
        found, count = token_weights(lengths, aggregation, 8)
        assert found.tolist() == weights
        assert count == normalizer
    with pytest.raises(ValueError, match="'median' is neither token_mean nor sequence_mean nor"):
        token_weights(lengths, "median", 8)


@pytest.mark.parametrize(
    ("value", "loss", "gradient", "clipped"),
    [
        # Old value 0, clip 0.5, returns 2.
        (0.25, 1.75**2 / 2, -1.75, 0.0),
        (1.0, 1.5**2 / 2, 0.0, 1.0),  # past the clip towards the return: held at 0.5
        (-1.0, 9.0 / 2, -3.0, 0.0),  # past it away from the return: the full error counts
    ],
)
def test_the_value_loss_lets_the_critic_move_by_the_clip_only(value, loss, gradient, clipped):
    values = doubles(value).requires_grad_()
    found, metrics = clipped_value_loss(values, doubles(0.0), doubles(2.0), doubles(1.0), clip=0.5)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)
    assert metrics["value_clip_fraction"].item() == clipped
    assert metrics["value"].item() == value


def test_the_gradient_of_the_value_loss_equals_finite_differences():
    generator = torch.Generator().manual_seed(2)
    values, old, returns = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: clipped_value_loss(v, old, returns, weights, clip=0.4)[0], values.requires_grad_()
    )


def plain_policy_gradient(log_probs, columns, token_weights, config):
    loss = -(token_weights * columns["advantages"] * log_probs).sum()
    return loss, {"own": columns["sequence_ids"].max() + config.clip_low}


def test_a_loss_by_dotted_path_gets_columns_and_configuration():
    log_probs, entropy, columns = problem(10, [2, 3])
    name = "tests.algorithms.test_policy_losses.plain_policy_gradient"
    weights = torch.ones(5).double()
    loss, metrics = grpo_loss(AlgorithmConfig(loss=name, kl_coefficient=0.5, clip_low=0.25))(
        log_probs, entropy, columns, weights
    )
    difference = columns["reference_log_probs"] - log_probs
    expected = -(columns["advantages"] * log_probs).sum() + 0.5 * (difference.exp() - 1 - difference).sum()
    assert loss.item() == pytest.approx(expected.item())
    assert metrics["own"].item() == 1.25


def test_a_kl_in_the_reward_stays_out_of_the_loss():
    log_probs, entropy, columns = problem(11, [2, 3])
    weights = torch.ones(5).double()
    plain, _ = grpo_loss(AlgorithmConfig())(log_probs, entropy, columns, weights)
    found, metrics = grpo_loss(AlgorithmConfig(kl_coefficient=0.5, kl_in="reward"))(
        log_probs, entropy, columns, weights
    )
    assert found.item() == plain.item()
    assert metrics["kl/reference"].item() > 0


def test_a_column_that_gspo_lacks_is_named():
    log_probs, entropy, columns = problem(12, [2, 3])
    del columns["sequence_ids"]
    with pytest.raises(ValueError, match=r"the gspo loss needs the columns \['sequence_ids'\]"):
        grpo_loss(AlgorithmConfig(loss="gspo"))(log_probs, entropy, columns, torch.ones(5).double())


def test_ppo_and_dual_clip_agree_where_no_bad_token_got_far_likelier():
    log_probs, _, columns = problem(13, [6, 6], spread=0.1)
    named = {"clip_low": 0.2, "clip_high": 0.28}
    arguments = (log_probs, columns["old_log_probs"], columns["advantages"], torch.ones(12).double())
    single, _ = clipped_policy_loss(*arguments, **named)
    double, _ = dual_clip_policy_loss(*arguments, **named, dual_clip=3.0)
    assert single.item() == double.item()
