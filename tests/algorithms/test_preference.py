"""DPO, cDPO and IPO: by hand, by their minima, by finite differences."""

import math

import pytest
import torch

from qerl_rl.algorithms.preference import conservative_dpo_loss, dpo_loss, ipo_loss


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


LOSSES = {
    "dpo": lambda *pairs: dpo_loss(*pairs, beta=0.5),
    "cdpo": lambda *pairs: conservative_dpo_loss(*pairs, beta=0.5, flip_probability=0.2),
    "ipo": lambda *pairs: ipo_loss(*pairs, beta=0.5),
}


def pairs(seed: int, count: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(-20 + 2 * torch.randn(4, count, generator=generator, dtype=torch.float64))


def test_losses_of_a_hand_computed_pair():
    # Log ratios: chosen 2, rejected -2, so h = 4 and beta * h = 2.
    pair = (doubles(-8.0), doubles(-7.0), doubles(-10.0), doubles(-5.0))
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    loss, metrics = LOSSES["dpo"](*pair)
    assert loss.item() == pytest.approx(right)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"preference_loss": right, "reward_chosen": 1.0, "reward_rejected": -1.0, "reward_margin": 2.0, "accuracy": 1.0}
    )
    assert LOSSES["cdpo"](*pair)[0].item() == pytest.approx(0.8 * right + 0.2 * wrong)
    assert LOSSES["ipo"](*pair)[0].item() == pytest.approx((4 - 1) ** 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    chosen, rejected, *reference = pairs(1)
    assert torch.autograd.gradcheck(
        lambda good, bad: LOSSES[name](good, bad, *reference)[0], (chosen.requires_grad_(), rejected.requires_grad_())
    )


def test_the_gradient_of_dpo_is_weighted_by_how_wrong_the_policy_is():
    """Eq. 7 of the paper, differentiated: -beta * sigmoid(rejected reward - chosen reward)."""
    chosen, rejected, *reference = pairs(2)
    chosen.requires_grad_()
    dpo_loss(chosen, rejected, *reference, beta=0.3)[0].backward()
    margin = 0.3 * ((chosen - reference[0]) - (rejected - reference[1])).detach()
    torch.testing.assert_close(chosen.grad, -0.3 * torch.sigmoid(-margin))


@pytest.mark.parametrize(("name", "margin"), [("cdpo", math.log(0.8 / 0.2) / 0.5), ("ipo", 1 / (2 * 0.5))])
def test_losses_with_a_finite_best_margin_have_no_slope_there(name, margin):
    chosen = doubles(margin).requires_grad_()
    LOSSES[name](chosen, doubles(0.0), doubles(0.0), doubles(0.0))[0].backward()
    assert chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_add_up_in_any_order_and_only_log_ratios_count(name):
    data = pairs(3)
    whole, metrics = LOSSES[name](*data)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    parts = [LOSSES[name](*(part[order[own]] for part in data)) for own in (slice(0, 2), slice(2, 6))]
    assert sum(part[0].item() for part in parts) == pytest.approx(whole.item())
    for metric, value in metrics.items():
        assert sum(part[1][metric].item() for part in parts) == pytest.approx(value.item())
    shift = doubles(1.0, -3.0, 0.5, 2.0, 0.0, 7.0)
    shifted, _ = LOSSES[name](data[0] + shift, data[1] - shift, data[2] + shift, data[3] - shift)
    assert shifted.item() == pytest.approx(whole.item())


@pytest.mark.parametrize("name", LOSSES)
def test_hopeless_pairs_give_finite_losses_and_gradients(name):
    chosen = torch.tensor([-5000.0, 0.0], requires_grad=True)
    loss, _ = LOSSES[name](chosen, torch.tensor([0.0, -5000.0]), torch.zeros(2), torch.zeros(2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(chosen.grad).all()


def test_input_that_makes_no_pairs_is_refused():
    with pytest.raises(ValueError, match="must be"):
        dpo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2), beta=0.1)
    with pytest.raises(ValueError, match=r"flip_probability 0\.5"):
        conservative_dpo_loss(*[torch.zeros(2)] * 4, beta=0.1, flip_probability=0.5)
