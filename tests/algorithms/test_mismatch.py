import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.algorithms.mismatch import SECTION, finish_mismatch, partial_mismatch, rollout_mismatch
from trainer.stages import token_weighted


def named(found):
    assert all(name.startswith(f"{SECTION}/") for name in found)
    return {name.removeprefix(f"{SECTION}/"): value for name, value in found.items()}


def test_mismatch_of_hand_computed_tokens():
    rollout = [np.log([0.5, 0.5]), [math.log(0.25)]]
    trainer = [np.log([0.5, 0.25]), [math.log(0.5)]]
    found = named(rollout_mismatch(rollout, trainer))
    log2 = math.log(2)
    # Ratios trainer / rollout are 1, 1/2 and 2; the first sample loses log 2 over two tokens, the second gains it.
    assert found == pytest.approx(
        {
            "kl": (0.0 + log2 - log2) / 3,
            "k3_kl": (0.0 + (-0.5 + log2) + (1.0 - log2)) / 3,
            "prob_diff_mean": 0.5 / 3,
            "prob_diff_max": 0.25,
            # Around their means, 5/12 each: (1, 1, -2) / 12 and (1, -2, 1) / 12.
            "pearson": (1 - 2 - 2) / 6,
            "ess": 3.5**2 / (3 * (1 + 0.25 + 4)),
            "ppl_ratio": (math.sqrt(2) + 0.5) / 2,
        }
    )


def test_equal_engines_have_no_mismatch():
    rows = [np.array([-0.3, -2.0], dtype=np.float32), np.array([-7.5], dtype=np.float32)]
    found = named(rollout_mismatch(rows, [row.copy() for row in rows]))
    none = {"kl": 0.0, "k3_kl": 0.0, "prob_diff_mean": 0.0, "prob_diff_max": 0.0}
    assert found == pytest.approx(none | {"pearson": 1.0, "ess": 1.0, "ppl_ratio": 1.0}, abs=1e-12)


def test_probabilities_that_do_not_vary_have_no_correlation_and_an_absurd_token_stays_finite():
    assert math.isnan(rollout_mismatch([[-0.5, -0.5]], [[-0.4, -0.6]])[f"{SECTION}/pearson"])
    found = named(rollout_mismatch([[-1e3, -0.5]], [[-0.1, -1e3]]))
    assert all(math.isfinite(value) for value in found.values())


def test_mean_over_samples_of_the_rollout_engine_approaches_the_true_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    rollout, trainer = torch.log_softmax(torch.randn(2, 20, generator=generator), dim=-1)
    tokens = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=generator)
    oracle = torch.nn.functional.kl_div(trainer, rollout, log_target=True, reduction="sum").item()
    found = named(rollout_mismatch([rollout[tokens].numpy()], [trainer[tokens].numpy()]))
    assert found["k3_kl"] == pytest.approx(oracle, rel=0.02)
    assert found["kl"] == pytest.approx(oracle, rel=0.05)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 6), min_size=4, max_size=8), st.integers(1, 3))
def test_ranks_together_say_what_one_rank_with_all_samples_does(seed, lengths, first):
    random = np.random.default_rng(seed)
    trainer = [-random.exponential(1.0, length) for length in lengths]
    rollout = [np.minimum(row + random.normal(0.0, 0.3, len(row)), 0.0) for row in trainer]
    parts = []
    for chosen in (slice(None, first), slice(first, None)):
        own = partial_mismatch(rollout[chosen], trainer[chosen])
        parts.append({"tokens": float(sum(lengths[chosen])), "entropy": 1.0, **own})
    together = finish_mismatch(token_weighted(parts))
    assert together == pytest.approx(rollout_mismatch(rollout, trainer) | {"entropy": 1.0}, rel=1e-9, abs=1e-12)
    # numpy's own correlation of the concatenation.
    left, right = np.exp(np.concatenate(rollout)), np.exp(np.concatenate(trainer))
    assert together[f"{SECTION}/pearson"] == pytest.approx(np.corrcoef(left, right)[0, 1], abs=1e-9)


def test_unequal_lengths_and_empty_steps_are_refused():
    with pytest.raises(ValueError, match="sample 1 has 2 and 1 log-probs"):
        rollout_mismatch([[-1.0], [-1.0, -2.0]], [[-1.0], [-1.0]])
    with pytest.raises(ValueError, match="no response token"):
        rollout_mismatch([[], []], [[], []])
