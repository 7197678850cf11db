import math

import numpy as np
import pytest
import torch

from qerl_rl.algorithms.mismatch import rollout_mismatch


def test_mismatch_of_hand_computed_tokens():
    rollout = [np.log([0.5, 0.5]), [math.log(0.25)]]
    trainer = [np.log([0.5, 0.25]), [math.log(0.5)]]
    found = rollout_mismatch(rollout, trainer)
    # Ratios trainer / rollout are 1, 1/2 and 2.
    assert found["mismatch/kl"] == pytest.approx((0.0 + (-0.5 + math.log(2)) + (1.0 - math.log(2))) / 3)
    assert found["mismatch/prob_diff_mean"] == pytest.approx(0.5 / 3)
    assert found["mismatch/prob_diff_max"] == pytest.approx(0.25)
    assert found["mismatch/log_prob_diff_mean"] == pytest.approx(2 * math.log(2) / 3)


def test_equal_engines_have_no_mismatch():
    rows = [np.array([-0.3, -2.0], dtype=np.float32), np.array([-7.5], dtype=np.float32)]
    assert set(rollout_mismatch(rows, [row.copy() for row in rows]).values()) == {0.0}


def test_mean_over_samples_of_the_rollout_engine_approaches_the_true_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    rollout, trainer = torch.log_softmax(torch.randn(2, 20, generator=generator), dim=-1)
    tokens = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=generator)
    oracle = torch.nn.functional.kl_div(trainer, rollout, log_target=True, reduction="sum").item()
    found = rollout_mismatch([rollout[tokens].numpy()], [trainer[tokens].numpy()])
    assert found["mismatch/kl"] == pytest.approx(oracle, rel=0.02)


def test_unequal_lengths_and_empty_steps_are_refused():
    with pytest.raises(ValueError, match="sample 1 has 2 and 1 log-probs"):
        rollout_mismatch([[-1.0], [-1.0, -2.0]], [[-1.0], [-1.0]])
    with pytest.raises(ValueError, match="no response token"):
        rollout_mismatch([[], []], [[], []])
