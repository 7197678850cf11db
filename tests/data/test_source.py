import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.config.errors import ConfigError
from qerl_rl.data.prompts import Prompt, held_out
from qerl_rl.data.source import PromptSource


def numbered(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), np.array([i], dtype=np.int32), str(i)) for i in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 5), st.booleans())
def test_every_epoch_gives_every_prompt_once_however_it_is_cut(count, cuts, seed, shuffle):
    source = PromptSource(numbered(count), seed=seed, shuffle=shuffle)
    taken = [prompt.index for cut in cuts for prompt in source.next(cut)]
    assert len(taken) == sum(cuts)
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == list(range(count))
    one_cut = PromptSource(numbered(count), seed=seed, shuffle=shuffle).next(sum(cuts))
    assert [prompt.index for prompt in one_cut] == taken
    if not shuffle:
        assert taken == [position % count for position in range(len(taken))]


def test_epochs_and_seeds_have_orders_of_their_own():
    source = PromptSource(numbered(50), seed=1, shuffle=True)
    first, second = ([prompt.index for prompt in source.next(50)] for _ in range(2))
    other = [prompt.index for prompt in PromptSource(numbered(50), seed=2, shuffle=True).next(50)]
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 70), st.integers(1, 50))
def test_a_restored_source_goes_on_where_it_was(count, before, after):
    source = PromptSource(numbered(count), seed=3, shuffle=True)
    source.next(before)
    state = json.loads(json.dumps(source.state()))
    restored = PromptSource(numbered(count), seed=3, shuffle=True)
    restored.load_state(state)
    expected = [prompt.index for prompt in source.next(after)]
    assert [prompt.index for prompt in restored.next(after)] == expected


def test_a_checkpoint_of_other_data_is_refused():
    state = PromptSource(numbered(10), seed=1, shuffle=True).state()
    for source, key in (
        (PromptSource(numbered(11), seed=1, shuffle=True), "data section"),
        (PromptSource(numbered(10), seed=2, shuffle=True), "run.seed"),
        (PromptSource(numbered(10), seed=1, shuffle=False), "data.shuffle"),
    ):
        with pytest.raises(ConfigError) as caught:
            source.load_state(state)
        assert key in caught.value.fix


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(1, 5))
def test_training_sees_no_held_out_prompt(values, count):
    prompts = [Prompt(i, str(v), np.array([v], dtype=np.int32), str(v)) for i, v in enumerate(values)]
    if len(set(values)) <= count:
        with pytest.raises(ConfigError, match=r"eval\.prompts"):
            held_out(prompts, count)
        return
    train, evaluation = held_out(prompts, count)
    texts = [prompt.text for prompt in evaluation]
    assert len(texts) == len(set(texts)) == count
    assert [prompt for prompt in prompts if prompt.text not in texts] == train
    assert [prompt.index for prompt in held_out(prompts, count)[1]] == [prompt.index for prompt in evaluation]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_a_state_taken_anywhere_in_any_epoch_continues_bit_for_bit(count, cuts, seed, shuffle):
    straight = PromptSource(numbered(count), seed=seed, shuffle=shuffle)
    broken = PromptSource(numbered(count), seed=seed, shuffle=shuffle)
    for cut in cuts:
        expected = straight.next(cut)
        # A new source at each cut, as in a run that is killed and resumed after every step.
        resumed = PromptSource(numbered(count), seed=seed, shuffle=shuffle)
        resumed.load_state(json.loads(json.dumps(broken.state())))
        broken = resumed
        assert [prompt.index for prompt in broken.next(cut)] == [prompt.index for prompt in expected]
        assert broken.state() == straight.state()
    assert broken.epochs == pytest.approx(sum(cuts) / count)


def test_a_state_stays_small_and_holds_whole_numbers_only():
    source = PromptSource(numbered(7), seed=1, shuffle=True)
    fresh = source.state()
    source.next(7 * 1000 + 3)
    state = source.state()
    assert state == {**fresh, "given": 7003}
    assert all(type(value) is int and value < 2**63 for value in state.values())


@pytest.mark.parametrize("change", ["answer", "tokens", "order"])
def test_other_prompts_of_the_same_number_are_refused(change):
    prompts = numbered(5)
    state = PromptSource(prompts, seed=1, shuffle=True).state()
    other = numbered(5)
    if change == "answer":
        other[2] = Prompt(2, "2", prompts[2].tokens, "3")
    elif change == "tokens":
        other[2] = Prompt(2, "2", np.array([2, 2], dtype=np.int32), "2")
    else:
        other[1], other[3] = other[3], other[1]
    with pytest.raises(ConfigError, match="digest"):
        PromptSource(other, seed=1, shuffle=True).load_state(state)
