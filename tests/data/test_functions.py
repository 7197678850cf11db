"""Data sets that a function gives: the same rows as from a file, and a fix for whatever the function does wrong."""

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.prompts import load_prompts

MODULE = """
from datasets import Dataset, DatasetDict

ROWS = [{"question": f"{n}+{n}=", "result": f"it is #### {2 * n}"} for n in range(1, 5)]


def rows(data, split):
    return ROWS[: data.limit or None] if split == "train" else ROWS[:1]


def lazily(data, split):
    yield from ROWS
    raise OSError("disk on fire")


def dataset(data, split):
    return Dataset.from_list(ROWS)


def splits(data, split):
    return DatasetDict({"train": Dataset.from_list(ROWS)})


def nothing(data, split):
    return None


def none_at_all(data, split):
    return []


def broken(data, split):
    return ROWS[99]


def alone(split):
    return ROWS
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def load(tokenizer, path, *, eval_path="", **fields):
    fields = {"prompt_field": "question", "answer_field": "result", "answer_after": "####"} | fields
    data = DataConfig(train_path=path, **fields)
    found = load_prompts(
        data, tokenizer, max_prompt_tokens=4, seed=1, count_needed=0, eval_path=eval_path, eval_split="test"
    )
    return [(prompt.text, prompt.answer) for prompt in found.prompts]


@pytest.mark.parametrize("name", ["own_data.rows", "own_data.dataset"])
def test_rows_of_a_function_go_the_way_of_those_of_a_file(tokenizer, name):
    assert load(tokenizer, name) == [(f"{n}+{n}=", str(2 * n)) for n in range(1, 5)]
    assert load(tokenizer, name, prompt_template="{question}", limit=2)[1:] == [("2+2=", "4")]


def test_data_limit_stops_a_generator_before_what_it_would_raise(tokenizer):
    assert len(load(tokenizer, "own_data.lazily", limit=4)) == 4


def test_the_evaluation_asks_for_its_own_split(tokenizer):
    assert load(tokenizer, "own_data.rows", eval_path="own_data.rows") == [("1+1=", "2")]


def test_a_file_that_is_there_or_has_a_file_ending_is_no_function(tokenizer, tmp_path):
    (tmp_path / "own_data.rows").write_text('{"question": "f", "result": "####file"}\n')
    assert load(tokenizer, "own_data.rows") == [("f", "file")]
    with pytest.raises(ConfigError, match=r"own_data\.json does not exist"):
        load(tokenizer, "own_data.json")


@pytest.mark.parametrize(
    ("name", "problem", "fix", "where"),
    [
        ("own_data.row", "has no function row", "name rows instead", "own_data.py"),
        ("own_dat.rows", "no module own_dat", "PYTHONPATH (a file is named by its ending, one of .jsonl", ""),
        ("own_data.alone", "can't be called with (data, split)", "let it take these", "own_data.py"),
        ("own_data.lazily", "raised OSError: disk on fire", "an iterable of dictionaries", "own_data.py:13"),
        ("own_data.broken", "raised IndexError", "an iterable of dictionaries", "own_data.py:33"),
        ("own_data.nothing", "raised TypeError: 'NoneType' object is not iterable", "iterable of dictionaries", ""),
        ("own_data.splits", "row 1 of data.train_path=own_data.splits is 'train'", "the rows of one split", ""),
        ("own_data.none_at_all", "own_data.none_at_all has no lines", "at least one line or row", ""),
    ],
)
def test_what_a_function_does_wrong_is_answered_with_the_fix(tokenizer, name, problem, fix, where):
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, name)
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert where in caught.value.where


def test_a_wrong_row_is_named_by_function_and_number(tokenizer):
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, "own_data.rows", answer_field="answer")
    assert caught.value.where == "own_data.rows, row 1"
