from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.metrics.accuracy import accuracy_metrics, majority_row, pass_at_k


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_answer(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_stays_finite():
    assert pass_at_k(10000, 1, 100) == pytest.approx(0.01)
    assert pass_at_k(10000, 0, 10000) == 0.0
    assert pass_at_k(10000, 1, 10000) == 1.0


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_impossible_counts(samples, correct, k):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, correct, k)


@pytest.mark.parametrize(
    ("groups", "row"),
    [
        ([1, 2, 2], 1),
        ([5, 2, 2, 5], 0),
        ([None, 3, None, None], 1),
        ([None, None], None),
        ([7, 8, 9], 0),
        ([], None),
    ],
)
def test_the_majority_and_its_ties(groups, row):
    assert majority_row(groups) == row


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.none() | st.integers(0, 3), max_size=8), st.permutations(range(4)))
def test_the_majority_does_not_depend_on_the_names_of_the_answers(groups, names):
    renamed = [None if group is None else names[group] for group in groups]
    assert majority_row(renamed) == majority_row(groups)


def test_metrics_of_several_answers():
    correct = np.array([[True, False, False, True], [False, True, False, False], [False] * 4])
    groups = [[0, 1, 2, 0], [0, 1, 0, None], [None] * 4]
    # Majorities: rows 0 (right), 0 (wrong), nobody. pass@2: 1 - C(2,2)/C(4,2) = 5/6; 1 - C(3,2)/C(4,2) = 1/2; 0.
    assert accuracy_metrics(correct, groups) == pytest.approx(
        {"avg@4": 3 / 12, "maj@4": 1 / 3, "pass@1": 3 / 12, "pass@2": (5 / 6 + 1 / 2) / 3, "pass@4": 2 / 3}
    )


def test_metrics_of_an_odd_number_and_of_one_answer():
    assert set(accuracy_metrics(np.ones((2, 3), dtype=bool), [[0] * 3] * 2)) == {
        "avg@3", "maj@3", "pass@1", "pass@2", "pass@3",
    }  # fmt: skip
    assert accuracy_metrics(np.array([[True], [False]]), []) == {"pass@1": 0.5}
