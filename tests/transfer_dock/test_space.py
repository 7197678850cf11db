"""The address space of an arena against a model that marks every block of 64 bytes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from transfer_dock.space import Space

BLOCK = 64
BLOCKS = 24


class SpaceMachine(RuleBasedStateMachine):
    @initialize(odd=st.integers(0, BLOCK - 1))
    def start(self, odd: int) -> None:
        self.space = Space(BLOCKS * BLOCK + odd)
        self.taken = [False] * BLOCKS
        self.extents: dict[int, int] = {}
        self.highest = 0

    def mark(self, first: int, count: int) -> None:
        self.taken[first : first + count] = [True] * count
        self.extents[first] = count
        self.highest = max(self.highest, first + count)

    @rule(nbytes=st.integers(0, 6 * BLOCK))
    def allocate(self, nbytes: int) -> None:
        count = max(1, -(-nbytes // BLOCK))
        fits = [first for first in range(BLOCKS - count + 1) if not any(self.taken[first : first + count])]
        found = self.space.allocate(nbytes)
        assert found == (fits[0] * BLOCK if fits else None)
        if fits:
            self.mark(fits[0], count)

    @rule(offset=st.integers(-1, BLOCKS).map(lambda block: block * BLOCK), nbytes=st.integers(0, 4 * BLOCK))
    def take(self, offset: int, nbytes: int) -> None:
        first, count = offset // BLOCK, max(1, -(-nbytes // BLOCK))
        if first < 0 or first + count > BLOCKS or any(self.taken[first : first + count]):
            with pytest.raises(ValueError, match=r"in use|can lie"):
                self.space.take(offset, nbytes)
        else:
            self.space.take(offset, nbytes)
            self.mark(first, count)

    @precondition(lambda self: self.extents)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(sorted(self.extents)))
        self.space.free(first * BLOCK)
        count = self.extents.pop(first)
        self.taken[first : first + count] = [False] * count

    @rule(offset=st.integers(-1, BLOCKS * BLOCK))
    def free_what_does_not_begin_there(self, offset: int) -> None:
        if offset % BLOCK or offset // BLOCK not in self.extents:
            with pytest.raises(KeyError, match=f"begins at {offset}"):
                self.space.free(offset)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.space.extents() == [(first * BLOCK, self.extents[first] * BLOCK) for first in sorted(self.extents)]
        assert self.space.used == sum(self.taken) * BLOCK
        assert self.space.highest == self.highest * BLOCK


SpaceMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False
)
TestSpace = SpaceMachine.TestCase


def test_a_space_that_was_emptied_in_any_order_fits_one_extent_of_its_size() -> None:
    space = Space(8 * BLOCK)
    offsets = [space.allocate(BLOCK) for _ in range(8)]
    assert space.allocate(1) is None
    for offset in (offsets[3], offsets[5], offsets[4], offsets[0], offsets[7], offsets[1], offsets[2], offsets[6]):
        assert offset is not None
        space.free(offset)
    assert space.allocate(8 * BLOCK) == 0


def test_a_replayed_space_goes_on_like_the_one_it_was_read_from() -> None:
    space = Space(1 << 20)
    offsets = [space.allocate(nbytes) for nbytes in (100, 0, 5000, 64, 1 << 16)]
    for offset in offsets[1::2]:
        assert offset is not None
        space.free(offset)
    replayed = Space(1 << 20)
    for offset, nbytes in reversed(space.extents()):
        replayed.take(offset, nbytes)
    assert replayed.extents() == space.extents()
    assert [replayed.allocate(nbytes) for nbytes in (64, 64, 1 << 17)] == [
        space.allocate(nbytes) for nbytes in (64, 64, 1 << 17)
    ]


def test_no_extent_fits_a_space_of_less_than_64_bytes() -> None:
    assert Space(63).allocate(0) is None
    with pytest.raises(ValueError, match="-1 bytes"):
        Space(64).allocate(-1)
    with pytest.raises(ValueError, match="can lie at 8"):
        Space(256).take(8, 64)
