import json

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.prompts import load_prompts
from qerl_rl.data.template import PromptTemplate


def load(tokenizer, path, **fields):
    data = DataConfig(train_path=path, **fields)
    return load_prompts(data, tokenizer, max_prompt_tokens=20, seed=1, count_needed=4)


def test_a_template_takes_fields_in_its_order_and_leaves_values_alone(tokenizer, write):
    path = write({"a": "{b}", "b": 7, "answer": 1}, {"a": "x", "b": 0.5, "answer": 2})
    found = load(tokenizer, path, prompt_template="{b}: {{{a}}} {b}", instruction="!")
    assert [prompt.text for prompt in found.prompts] == ["7: {{b}} 7!", "0.5: {x} 0.5!"]
    assert [tokenizer.decode(prompt.tokens) for prompt in found.prompts] == [prompt.text for prompt in found.prompts]


def test_a_template_works_on_generated_sums(tokenizer):
    plain = load(tokenizer, "arithmetic").prompts
    found = load(tokenizer, "arithmetic", prompt_template="Q {prompt}").prompts
    assert [prompt.text for prompt in found] == ["Q " + prompt.text for prompt in plain]


@pytest.mark.parametrize(
    ("template", "problem", "fix"),
    [
        ("no fields", "names no field", "name of a field"),
        ("{question", "no template", "close every"),
        ("} {a}", "no template", "braces"),
        ("{}", "{} in data.prompt_template is not the plain name", "{{ and }}"),
        ("{0}", "{0} in", "{{ and }}"),
        ("{a.__class__}", "{a.__class__} in", "{{ and }}"),
        ("{a[0]}", "{a[0]} in", "{{ and }}"),
        ("{a!r}", "{a!r} in", "{{ and }}"),
        ("{a:>5}", "{a:>5} in", "{{ and }}"),
    ],
)
def test_what_is_no_template_is_refused(template, problem, fix):
    with pytest.raises(ConfigError) as caught:
        PromptTemplate(template)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("second", "problem", "fix"),
    [
        ({"questoin": "x", "answer": "2"}, "no field 'question' (data.prompt_template)", "write {questoin} in"),
        ({"question": ["x"], "answer": "2"}, 'is ["x"], not text or a number', "correct or remove the line"),
    ],
)
def test_a_template_that_an_entry_can_not_fill_names_its_line(tokenizer, write, second, problem, fix):
    path = write({"question": "x", "answer": "1"}, second)
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, path, prompt_template="Q: {question}")
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert caught.value.where == f"{path}:2"


def test_longer_prompts_are_left_out_and_counted(tokenizer, write):
    path = write(*[{"prompt": "x" * length, "answer": str(length)} for length in (3, 50, 10, 11, 4)])
    found = load(tokenizer, path, max_prompt_tokens=10)
    assert [(prompt.index, prompt.answer) for prompt in found.prompts] == [(0, "3"), (2, "10"), (4, "4")]
    assert found.left_out == 2
    with pytest.raises(ConfigError, match=r"rollout\.max_prompt_tokens"):
        load(tokenizer, path)


def test_a_filter_counts_the_template_and_may_not_take_everything(tokenizer, write):
    path = write({"prompt": "x" * 5, "answer": ""}, {"prompt": "x" * 6, "answer": ""})
    found = load(tokenizer, path, max_prompt_tokens=9, prompt_template="a: {prompt}", instruction="!")
    assert [prompt.text for prompt in found.prompts] == ["a: xxxxx!"]
    with pytest.raises(ConfigError, match="leaves out every prompt") as caught:
        load(tokenizer, path, max_prompt_tokens=4)
    assert "to 5 or more" in caught.value.fix


def test_an_answer_without_its_mark_is_no_error_in_a_prompt_left_out(tokenizer, write):
    path = write({"prompt": "x" * 15, "answer": "none"}, {"prompt": "x", "answer": "#### 1"})
    assert json.dumps([p.answer for p in load(tokenizer, path, max_prompt_tokens=9, answer_after="####").prompts]) == (
        '["1"]'
    )
