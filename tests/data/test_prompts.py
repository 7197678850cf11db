import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.prompts import Prompt, PromptSource, held_out, load_prompts

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A token a byte."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(path)

    return write_lines


def load(tokenizer, path, *, max_prompt_tokens=100, count_needed=0, seed=1, eval_path="", **fields):
    data = DataConfig(train_path=path, **fields)
    return load_prompts(
        data,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        count_needed=count_needed,
        eval_path=eval_path,
    )


def numbered(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), np.array([i], dtype=np.int32), str(i)) for i in range(count)]


def test_prompts_keep_text_answers_and_order_of_the_file(tokenizer, write):
    path = write(
        {"prompt": "1+1=", "answer": "2", "source": 1}, "", {"prompt": "größer?", "answer": 7, "source": ["x"]}
    )
    prompts = load(tokenizer, path)
    assert [(prompt.index, prompt.text, prompt.answer) for prompt in prompts] == [(0, "1+1=", "2"), (1, "größer?", "7")]
    assert [tokenizer.decode(prompt.tokens) for prompt in prompts] == ["1+1=", "größer?"]
    assert all(prompt.tokens.dtype == np.int32 for prompt in prompts)


def test_answers_are_never_reinterpreted(tokenizer, write):
    answers = ["01", "2024-01-01", 3, 3.5, "1e3", -4]
    path = write(*[{"prompt": "p", "answer": answer} for answer in answers])
    assert [prompt.answer for prompt in load(tokenizer, path)] == ["01", "2024-01-01", "3", "3.5", "1e3", "-4"]


def test_template_system_prompt_instruction_and_answer_mark(tokenizer, write, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    path = write({"question": "Why?", "answer": "so 1 #### or 2 #### 42 "})
    (prompt,) = load(
        tokenizer,
        path,
        prompt_field="question",
        chat_template=True,
        system_prompt="Be brief.",
        instruction=" Think.",
        answer_after="####",
    )
    assert tokenizer.decode(prompt.tokens) == "<system>Be brief.</><user>Why? Think.</><assistant>"
    assert (prompt.text, prompt.answer) == ("Why? Think.", "42")


def test_limit_reads_no_further(tokenizer, write):
    path = write({"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}, "not JSON")
    assert [prompt.text for prompt in load(tokenizer, path, limit=2)] == ["a", "b"]


def test_generated_sums_are_right_and_follow_the_seed(tokenizer):
    prompts = load(tokenizer, "arithmetic", count_needed=50)
    assert len(prompts) == 50
    assert all(eval(prompt.text.rstrip("=")) == int(prompt.answer) for prompt in prompts)
    assert [p.text for p in load(tokenizer, "arithmetic", count_needed=50)] == [p.text for p in prompts]
    assert [p.text for p in load(tokenizer, "arithmetic", count_needed=50, seed=2)] != [p.text for p in prompts]
    assert len(load(tokenizer, "arithmetic", count_needed=50, limit=5)) == 5


GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    ("lines", "fields", "place", "problem", "fix"),
    [
        ([GOOD, {"promt": "x", "answer": "2"}], {}, ":2", "has promt, answer", "data.prompt_field to promt"),
        ([GOOD, "", {"prompt": "x"}], {}, ":3", "no field 'answer'", "data.answer_field to the field"),
        ([GOOD, {}], {}, ":2", "it has none", "correct the line"),
        ([GOOD, '{"prompt": "x", '], {}, ":2", "not readable JSON", "one JSON object a line"),
        ([[GOOD]], {}, ":1", "a JSON list", "jq -c"),
        (["[", json.dumps(GOOD), "]"], {}, ":1", "not readable JSON", "jq -c"),
        ([GOOD, "3"], {}, ":2", "a JSON int", "one JSON object a line"),
        ([GOOD, {"prompt": ["x"], "answer": "2"}], {}, ":2", 'is ["x"], not text', "correct or remove"),
        ([GOOD, {"prompt": "", "answer": "2"}], {}, ":2", 'is "", not text', "correct or remove"),
        ([GOOD, {"prompt": "x", "answer": None}], {}, ":2", "is null, not text or a number", "correct or remove"),
        ([GOOD, {"prompt": "x" * 30, "answer": ""}], {}, ":2", "has 30 tokens", "max_prompt_tokens to 30 or more"),
        ([GOOD], {"answer_after": "####"}, ":1", "no '####'", "data.answer_after"),
        ([], {}, "", "has no lines", "data.train_path"),
        ([GOOD], {"chat_template": True}, "", "no chat template", "data.chat_template to false"),
        ([GOOD], {"system_prompt": "Hi"}, "", "system_prompt has no place", "data.chat_template to true"),
    ],
)
def test_unusable_data_is_named_with_its_line_and_fix(tokenizer, write, lines, fields, place, problem, fix):
    path = write(*lines)
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, path, max_prompt_tokens=20, **fields)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    if place:
        assert caught.value.where == path + place


def test_too_long_prompts_are_counted_and_the_longest_decides_the_fix(tokenizer, write):
    path = write(*[{"prompt": "x" * length, "answer": ""} for length in (5, 25, 8, 31)])
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, path, max_prompt_tokens=20)
    assert caught.value.where == f"{path}:2"
    assert "25 tokens" in caught.value.problem
    assert "2 of 4 prompts" in caught.value.problem
    assert "31 or more" in caught.value.fix


def test_missing_files_are_named_with_their_key_and_the_nearest_file(tokenizer, write, tmp_path):
    path = write(GOOD, name="train.jsonl")
    with pytest.raises(ConfigError, match=r"data\.train_path") as caught:
        load(tokenizer, str(tmp_path / "trian.jsonl"))
    assert path in caught.value.fix
    with pytest.raises(ConfigError, match=r"eval\.path"):
        load(tokenizer, path, eval_path=str(tmp_path / "missing.jsonl"))
    with pytest.raises(ConfigError, match="empty"):
        load(tokenizer, "")
    with pytest.raises(ConfigError, match="directory"):
        load(tokenizer, str(tmp_path))
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(tokenizer, str(tmp_path / "binary.jsonl"))


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
