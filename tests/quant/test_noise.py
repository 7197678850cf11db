"""The noise schedule is the published one, and the numbers can be drawn again anywhere."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qerl_rl.config.checks import CHOICES
from qerl_rl.config.schema import NoiseConfig
from qerl_rl.quant.noise import SCHEDULES, Noise, gaussian, sigma_at

FALLING = ["exponential", "linear", "cosine", "logarithmic"]


def test_schedule_is_qerls_for_ten_stages_of_two_steps() -> None:
    noise = NoiseConfig(enabled=True, sigma_start=1e-2, sigma_end=1e-4, stages=10)
    published = [0.0] + [1e-2 * (1e-4 / 1e-2) ** (k / 8) for k in range(9)]
    expected = [sigma for sigma in published for _ in range(2)]
    assert [sigma_at(step, 20, noise) for step in range(1, 21)] == pytest.approx(expected, rel=1e-12)


@given(steps=st.integers(1, 400), stages=st.integers(1, 20), schedule=st.sampled_from(FALLING))
def test_schedule_starts_clean_then_only_falls_between_its_ends(steps: int, stages: int, schedule: str) -> None:
    noise = NoiseConfig(enabled=True, sigma_start=1e-2, sigma_end=1e-4, stages=stages, schedule=schedule)
    sigmas = [sigma_at(step, steps, noise) for step in range(1, steps + 1)]
    assert sigmas[0] == 0.0
    noisy = [sigma for sigma in sigmas if sigma]
    assert sigmas == [0.0] * (len(sigmas) - len(noisy)) + noisy
    assert noisy == sorted(noisy, reverse=True)
    assert all(1e-4 * (1 - 1e-9) <= sigma <= 1e-2 for sigma in noisy)
    if steps >= stages >= 3:
        assert noisy[0] == pytest.approx(1e-2)
        assert noisy[-1] == pytest.approx(1e-4)


def test_the_other_schedules_at_their_quarters() -> None:
    def middle(schedule: str) -> list[float]:
        noise = NoiseConfig(enabled=True, sigma_start=1.0, sigma_end=0.2, stages=6, schedule=schedule)
        return [sigma_at(step, 6, noise) for step in (3, 4, 5)]

    # By hand, for progress 1/4, 1/2, 3/4 of the way from 1.0 to 0.2.
    assert middle("linear") == pytest.approx([0.8, 0.6, 0.4])
    assert middle("cosine") == pytest.approx([0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5)])
    logarithms = [math.log(1 + (math.e - 1) / 4), math.log((1 + math.e) / 2), math.log(1 + (math.e - 1) * 3 / 4)]
    assert middle("logarithmic") == pytest.approx([1 - 0.8 * part for part in logarithms])
    assert middle("constant") == [1.0, 1.0, 1.0]


def test_every_schedule_can_be_named_in_a_launch_file() -> None:
    assert set(CHOICES["noise.schedule"]) == set(SCHEDULES)


def test_noise_is_added_to_the_clean_weight_and_an_exempt_router_can_take_it_out() -> None:
    clean = torch.linspace(-1.0, 1.0, 201)
    numbers = torch.from_numpy(gaussian(3, 2, "w", (201,)))
    assert torch.equal(Noise(0.3, 3, 2).on("w", clean), clean + 0.3 * numbers)
    assert torch.equal(Noise(0.3, 3, 2).on("w", clean.bfloat16()), clean.bfloat16().float() + 0.3 * numbers)
    exempt = Noise(0.3, 3, 2, exempt_router=True)
    noisy = exempt.on("w", clean)
    kept = noisy == clean + 0.3 * numbers
    assert torch.equal(noisy[~kept], clean[~kept])
    assert 0 < (~kept).sum() < 60
    correction = exempt.router_correction(noisy, clean)
    assert correction.abs().max() <= 2
    torch.testing.assert_close(noisy * correction, clean, rtol=1e-6, atol=0)


def test_stages_are_equal_parts_of_the_run() -> None:
    noise = NoiseConfig(enabled=True, stages=4)
    sigmas = [sigma_at(step, 12, noise) for step in range(1, 13)]
    assert [sigmas.count(sigma) for sigma in dict.fromkeys(sigmas)] == [3, 3, 3, 3]


def test_two_stages_are_none_then_sigma_start() -> None:
    noise = NoiseConfig(enabled=True, stages=2)
    assert [sigma_at(step, 2, noise) for step in (1, 2)] == [0.0, noise.sigma_start]


def test_disabled_noise_is_zero_at_every_step() -> None:
    assert all(sigma_at(step, 20, NoiseConfig(enabled=False)) == 0.0 for step in range(1, 21))


@pytest.mark.parametrize("step", [0, -1, 21])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        sigma_at(step, 20, NoiseConfig(enabled=True))


def test_numbers_depend_on_seed_step_and_name_alone() -> None:
    first = gaussian(1, 2, "model.norm.weight", (64,))
    np.random.default_rng(0).normal(size=100)
    assert np.array_equal(first, gaussian(1, 2, "model.norm.weight", (64,)))
    for other in (gaussian(2, 2, "model.norm.weight", (64,)), gaussian(1, 3, "model.norm.weight", (64,))):
        assert not np.isclose(first, other).any()
    assert not np.isclose(first, gaussian(1, 2, "model.norm.weights", (64,))).any()


def test_another_process_draws_the_same_numbers() -> None:
    # str hashes differ between processes; the key must not use them.
    code = "from qerl_rl.quant.noise import gaussian; print(gaussian(7, 3, 'a.b', (5,)).tobytes().hex())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == gaussian(7, 3, "a.b", (5,)).tobytes().hex()


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    long = gaussian(1, 1, "x", (8, 16))
    assert np.array_equal(long[:3].reshape(-1), gaussian(1, 1, "x", (48,)))


def test_numbers_are_standard_normal_and_independent_between_steps_and_names() -> None:
    count = 200_000
    draws = [gaussian(5, step, name, (count,)).astype(np.float64) for step in (1, 2) for name in ("a", "b")]
    for draw in draws:
        # Four standard errors of the mean, variance, kurtosis and of the share within one standard deviation.
        assert abs(draw.mean()) < 4 / math.sqrt(count)
        assert abs(draw.var() - 1) < 4 * math.sqrt(2 / count)
        assert abs((draw**4).mean() - 3) < 4 * math.sqrt(96 / count)
        assert abs((np.abs(draw) < 1).mean() - math.erf(1 / math.sqrt(2))) < 4 * math.sqrt(0.22 / count)
        assert abs((draw[1:] * draw[:-1]).mean()) < 4 / math.sqrt(count)
    for one in range(4):
        for other in range(one):
            assert abs((draws[one] * draws[other]).mean()) < 4 / math.sqrt(count)
    assert gaussian(5, 1, "a", (2,)).dtype == np.float32
