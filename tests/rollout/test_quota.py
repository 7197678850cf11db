"""The quota takes its number of groups in their order, and keeps places for those that must be among them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qerl_rl.rollout.quota import Quota


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.integers(0, n), st.integers(0, n))))
def test_it_takes_its_number_and_all_that_must(case):
    order, groups, musts = case
    must = set(range(min(musts, groups)))
    quota, taken = Quota(groups, must), []
    for group in order:
        assert quota.is_met == (len(taken) >= groups)
        if quota.takes(group):
            taken.append(group)
    assert len(taken) == groups
    assert must <= set(taken)
    # Of the others, the first ones.
    others = [group for group in order if group not in must]
    assert [group for group in taken if group not in must] == others[: groups - len(must)]


def test_places_are_kept_for_late_ones():
    quota = Quota(2, {7})
    assert [quota.takes(group) for group in (1, 2, 7, 3)] == [True, False, True, False]
    assert quota.is_met


def test_more_that_must_than_places_is_an_error():
    with pytest.raises(ValueError, match="2 groups must be among 1"):
        Quota(1, {1, 2})
