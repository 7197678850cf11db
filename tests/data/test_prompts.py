import json

import numpy as np
import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.prompts import load_prompts

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load(tokenizer, path, *, max_prompt_tokens=100, count_needed=0, seed=1, eval_path="", **fields):
    data = DataConfig(train_path=path, **fields)
    return load_prompts(
        data,
        tokenizer,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
        count_needed=count_needed,
        eval_path=eval_path,
    ).prompts


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
