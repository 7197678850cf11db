"""What comes back from vLLM is checked: a version that records nothing must not send tokens to expert 0."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.rollout.routing import routed_experts_of


@settings(deadline=None, derandomize=True)
@given(tokens=st.integers(0, 9), experts=st.integers(2, 300), seed=st.integers(0, 99))
def test_experts_come_in_the_smallest_type(tokens, experts, seed):
    dtype = np.dtype(np.uint8 if experts <= 256 else np.int16)
    rows = np.random.default_rng(seed).random((tokens, 3, experts)).argsort(-1)[..., :2]
    for given_as in (np.int32, np.uint16):
        found = routed_experts_of(SimpleNamespace(routed_experts=rows.astype(given_as)), dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, rows)


def test_an_expert_twice_or_none_at_all_is_an_error_that_names_the_key():
    zeros = np.zeros((5, 4, 2), np.uint8)
    with pytest.raises(RuntimeError, match=r"set router_replay\.mode to disabled"):
        routed_experts_of(SimpleNamespace(routed_experts=zeros), zeros.dtype)
    with pytest.raises(RuntimeError, match="does not record them"):
        routed_experts_of(SimpleNamespace(routed_experts=None), zeros.dtype)
