"""Pairs of responses: what is read, where a response ends, what is refused, and what a checkpoint remembers."""

import copy

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.pairs import load_pairs
from qerl_rl.data.prompts import held_out, load_prompts
from qerl_rl.data.source import PromptSource


@pytest.fixture
def ending(tokenizer):
    """A token a byte, and one for the end of a sequence."""
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"eos_token": "<end>"})
    return own


def load(tokenizer, path, *, max_response_tokens=8, seed=1, **fields):
    return load_pairs(
        DataConfig(train_path=path, **fields),
        tokenizer,
        max_prompt_tokens=20,
        max_response_tokens=max_response_tokens,
        seed=seed,
        count_needed=40,
    )


def test_fields_template_and_ends_of_responses(ending, write):
    path = write({"question": "Why?", "good": "so", "bad": 7}, {"question": "Who?", "good": "", "bad": "abcdefg"})
    fields = {"prompt_template": "Q: {question}", "chosen_field": "good", "rejected_field": "bad"}
    first, second = load(ending, path, **fields).prompts
    assert (first.text, first.answer, first.rejected_text) == ("Q: Why?", "so", "7")
    assert ending.decode(first.tokens) == "Q: Why?"
    read = [(first.chosen, "so"), (first.rejected, "7"), (second.chosen, ""), (second.rejected, "abcdefg")]
    for tokens, text in read:
        assert tokens.dtype == "int32"
        assert tokens[-1] == ending.eos_token_id
        assert ending.decode(tokens[:-1]) == text


def test_an_end_that_the_data_wrote_itself_is_not_doubled(ending, write):
    (pair,) = load(ending, write({"prompt": "p", "chosen": "a<end>", "rejected": "b"})).prompts
    assert len(pair.chosen) == len(pair.rejected) == 2


@pytest.mark.parametrize(
    ("row", "fields", "problem", "fix"),
    [
        ({"prompt": "p", "chosen": "12345678", "rejected": "2"}, {}, "9 tokens", "max_response_tokens to 12 or more"),
        ({"prompt": "p", "chosen": "1", "rejected": "2" * 11}, {}, "12 tokens", "max_response_tokens to 12 or more"),
        ({"prompt": "p" * 21, "chosen": "1", "rejected": "2"}, {}, "21 tokens", "rollout.max_prompt_tokens to 21"),
        ({"prompt": "p", "chosen": "1"}, {}, "no field 'rejected' (data.rejected_field)", "data.rejected_field"),
        ({"prompt": "p", "chosen": ["1"], "rejected": "2"}, {}, '["1"], not text or a number', "correct or remove"),
        ({"prompt": "p", "chose": "1", "rejected": "2"}, {}, "no field 'chosen'", "set data.chosen_field to chose"),
    ],
)
def test_what_is_wrong_with_a_pair_names_its_line(ending, write, row, fields, problem, fix):
    others = {"prompt": "p", "chosen": "1", "rejected": "2"}
    long = {"prompt": "p", "chosen": "1", "rejected": "2" * 11}
    path = write(others, row, *([long] if "12 or more" in fix else []))
    with pytest.raises(ConfigError) as caught:
        load(ending, path, **fields)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where == f"{path}:2"


def test_a_tokenizer_without_an_end_is_refused(tokenizer, write):
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        load(tokenizer, write({"prompt": "p", "chosen": "1", "rejected": "2"}))


def test_generated_pairs_prefer_the_sum_and_follow_the_seed(ending):
    pairs = load(ending, "arithmetic").prompts
    assert len(pairs) == 40
    for pair in pairs:
        assert eval(pair.text.rstrip("=")) == int(pair.answer)
        assert len(pair.rejected_text) == len(pair.answer)
        assert pair.rejected_text != pair.answer
    again, other = load(ending, "arithmetic").prompts, load(ending, "arithmetic", seed=2).prompts
    assert [pair.content for pair in again] == [pair.content for pair in pairs]
    assert [pair.content for pair in other] != [pair.content for pair in pairs]
    # The same sums that a run with rewards learns from.
    prompts = load_prompts(DataConfig("arithmetic"), ending, max_prompt_tokens=20, seed=1, count_needed=40).prompts
    assert [(prompt.text, prompt.answer) for prompt in prompts] == [(pair.text, pair.answer) for pair in pairs]


def test_a_source_of_pairs_resumes_and_refuses_other_rejected_responses(ending, write):
    rows = [{"prompt": str(row), "chosen": "1", "rejected": "2"} for row in range(5)]
    pairs = load(ending, write(*rows)).prompts
    source, resumed = (PromptSource(pairs, seed=3, shuffle=True) for _ in range(2))
    source.next(7)
    resumed.load_state(source.state())
    assert source.next(6) == resumed.next(6)
    rows[4]["rejected"] = "3"
    changed = PromptSource(load(ending, write(*rows)).prompts, seed=3, shuffle=True)
    with pytest.raises(ConfigError, match="digest"):
        changed.load_state(source.state())


def test_held_out_pairs_are_answered_by_their_chosen_response(ending, write):
    path = write(*[{"prompt": str(row), "chosen": f"c{row}", "rejected": "r"} for row in range(6)])
    train, evaluation = held_out(load(ending, path).prompts, 2)
    assert len(train) == 4
    assert [prompt.answer for prompt in evaluation] == [f"c{prompt.text}" for prompt in evaluation]
