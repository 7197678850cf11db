"""Dynamic sampling: which groups a step learns from."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.selection import Selection
from transfer_dock import SampleKey

SIZE = 2


def judge(selection, signals):
    """One round of groups of two samples, with signal or not."""
    first = selection.sampled
    keys = [SampleKey(5, first + group, index) for group in range(len(signals)) for index in range(SIZE)]
    rewards = [reward for signal in signals for reward in ((0.0, 1.0) if signal else (0.1, 0.1))]
    selection.add(keys, np.array(rewards, dtype=np.float32))


def test_new_groups_take_the_place_of_those_without_signal():
    selection = Selection(3)
    judge(selection, [True, False, False])
    assert selection.missing == 2
    judge(selection, [False, True])
    assert selection.missing == 1
    # Groups 0 and 4 have signal; 1, the oldest without, fills the step.
    assert selection.groups == {0, 1, 4}
    judge(selection, [True])
    assert selection.missing == 0
    assert selection.groups == {0, 4, 5}
    assert selection.keys == [SampleKey(5, group, index) for group in (0, 4, 5) for index in range(SIZE)]
    # Of six groups three earned 0 and 1, three 0.1 twice.
    assert selection.metrics()["sampling/groups"] == 6
    np.testing.assert_allclose(selection.metrics()["sampling/reward_mean"], (3 * 1.0 + 3 * 0.2) / 12, rtol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_step_has_the_wanted_number_of_groups_and_all_found_signal(wanted, rounds, random):
    selection, found = Selection(wanted), 0
    for _ in range(rounds):
        signals = [random.random() < 0.4 for _ in range(selection.missing)]
        if not signals:
            break
        found += sum(signals)
        judge(selection, signals)
    assert len(selection.groups) == wanted
    assert selection.missing == wanted - found
