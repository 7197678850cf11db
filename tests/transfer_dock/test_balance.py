"""Parts of equal cardinality, against the theorems on the differencing method and the true optimum of small inputs."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from transfer_dock.balance import _join, balanced_parts

# Exact worst cases of largest sum / optimal largest sum for m items a part (Michiels et al. 2003, STACS).
RATIO_BY_ITEMS = {1: Fraction(1), 2: Fraction(1), 3: Fraction(4, 3), 4: Fraction(19, 12), 5: Fraction(103, 60)}
SHAPES = st.tuples(st.integers(1, 6), st.integers(0, 8))


@st.composite
def problems(draw: st.DrawFn, low: int = 0, high: int = 1000) -> tuple[list[int], int]:
    parts, items = draw(SHAPES)
    return draw(st.lists(st.integers(low, high), min_size=parts * items, max_size=parts * items)), parts


def sums_of(tokens: Sequence[int], found: list[list[int]]) -> list[int]:
    return [sum(tokens[index] for index in part) for part in found]


def smallest_largest_sum(tokens: list[int], parts: int) -> int:
    """The optimum, by trying everything."""
    if parts == 1:
        return sum(tokens)
    best = sum(tokens)
    for others in combinations(range(1, len(tokens)), len(tokens) // parts - 1):
        part = {0, *others}
        own = sum(tokens[index] for index in part)
        if own < best:
            rest = [value for index, value in enumerate(tokens) if index not in part]
            best = min(best, max(own, smallest_largest_sum(rest, parts - 1)))
    return best


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(low=-50))
def test_every_item_is_in_one_part_and_parts_are_equally_many_in_order(problem: tuple[list[int], int]) -> None:
    tokens, parts = problem
    found = balanced_parts(tokens, parts)
    assert [len(part) for part in found] == [len(tokens) // parts] * parts
    assert sorted(index for part in found for index in part) == list(range(len(tokens)))
    assert all(part == sorted(part) for part in found)
    assert found == sorted(found)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(high=20), data=st.data())
def test_which_tokens_meet_does_not_depend_on_their_order(problem: tuple[list[int], int], data: st.DataObject) -> None:
    tokens, parts = problem
    shuffled = data.draw(st.permutations(tokens))
    one, other = (
        sorted(sorted(values[index] for index in part) for part in balanced_parts(values, parts))
        for values in (tokens, shuffled)
    )
    assert one == other


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(low=-1000))
def test_the_spread_is_at_most_the_widest_tuple_of_neighbours_in_size(problem: tuple[list[int], int]) -> None:
    tokens, parts = problem
    assume(tokens)
    falling = sorted(tokens, reverse=True)
    widest = max(falling[first] - falling[first + parts - 1] for first in range(0, len(tokens), parts))
    sums = sums_of(tokens, balanced_parts(tokens, parts))
    assert max(sums) - min(sums) <= widest


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), shape=st.sampled_from([(2, 2), (2, 3), (2, 4), (2, 5), (3, 2), (3, 3), (4, 2), (3, 1)]))
def test_the_largest_sum_keeps_the_proven_ratio_to_the_optimum(data: st.DataObject, shape: tuple[int, int]) -> None:
    parts, items = shape
    tokens = data.draw(st.lists(st.integers(0, 60), min_size=parts * items, max_size=parts * items))
    largest = max(sums_of(tokens, balanced_parts(tokens, parts)))
    best = smallest_largest_sum(tokens, parts)
    assert best <= largest <= min(RATIO_BY_ITEMS[items], 2 - Fraction(1, parts)) * best


def test_an_example_that_can_be_followed_by_hand() -> None:
    """Tuples (9, 7), (5, 4), (2, 1): 9 + 4 and 7 + 5 spread 1, as (2, 1) does, so 13 meets 1 and 12 meets 2."""
    assert balanced_parts([1, 9, 4, 5, 2, 7], 2) == [[0, 1, 2], [3, 4, 5]]


def test_joining_two_partial_partitions_puts_the_largest_set_to_the_smallest() -> None:
    joined = _join([(9, 0, [0]), (7, 1, [1])], [(5, 2, [2]), (4, 3, [3])])
    assert joined == [(13, 0, [0, 3]), (12, 1, [1, 2])]


@pytest.mark.parametrize(("items", "parts"), [(512, 8), (4096, 64)])
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_log_normal_lengths_are_balanced_where_contiguous_parts_are_not(items: int, parts: int, sigma: float) -> None:
    tokens = np.random.default_rng(7).lognormal(6, sigma, items).astype(int) + 1
    mean = tokens.sum() / parts
    ours = max(sums_of(tokens.tolist(), balanced_parts(tokens.tolist(), parts))) / mean
    contiguous = tokens.reshape(parts, -1).sum(axis=1).max() / mean
    print(f"{items} log-normal items (sigma {sigma}) over {parts}: max/mean {ours:.6f}, contiguous {contiguous:.3f}")
    assert ours < 1.01 < contiguous


def test_one_very_long_item_meets_short_ones() -> None:
    """One item of each tuple, as differencing leaves it, would be 1000 + 100 + 10 + 10."""
    tokens = [1000] + [100] * 7 + [10] * 8
    sums = sums_of(tokens, balanced_parts(tokens, 4))
    assert max(sums) == 1000 + 3 * 10


def test_arrays_are_taken_and_parts_that_do_not_divide_are_refused() -> None:
    assert balanced_parts(np.array([3, 1, 2, 2]), 2) == [[0, 1], [2, 3]]  # type: ignore[arg-type]
    assert balanced_parts([], 3) == [[], [], []]
    for tokens, parts in (([1, 2, 3], 2), ([1], 0), ([1], -1)):
        with pytest.raises(ValueError, match="equal cardinality"):
            balanced_parts(tokens, parts)
