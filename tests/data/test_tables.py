"""Parquet, Arrow and CSV files, written here by pyarrow and by hand, and names of the hub."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from datasets import Dataset

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.prompts import load_prompts

ROWS = [
    {"prompt": "1+1=", "answer": "2", "other": [1]},
    {"prompt": "größer?\nja", "answer": "01", "other": [2]},
    {"prompt": "p,q", "answer": "2024-01-01", "other": []},
    {"prompt": "x", "answer": "NA", "other": [3]},
]
EXPECTED = [(row["prompt"], row["answer"]) for row in ROWS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


def load(tokenizer, path, *, eval_path="", eval_split="", **fields):
    data = DataConfig(train_path=str(path), **fields)
    found = load_prompts(
        data,
        tokenizer,
        max_prompt_tokens=40,
        seed=1,
        count_needed=0,
        eval_path=eval_path,
        eval_split=eval_split,
    )
    return [(prompt.text, prompt.answer) for prompt in found.prompts]


def write_stream(table, path):
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "parquet": ("data.parquet", pyarrow.parquet.write_table),
    "arrow file": ("data.arrow", lambda table, path: pyarrow.feather.write_feather(table, path, compression="lz4")),
    "arrow stream": ("data.arrow", write_stream),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_tables_give_their_rows_in_order(tokenizer, tmp_path, kind):
    name, write = WRITERS[kind]
    write(pyarrow.Table.from_pylist(ROWS), str(tmp_path / name))
    assert load(tokenizer, tmp_path / name) == EXPECTED
    assert load(tokenizer, tmp_path / name, limit=2) == EXPECTED[:2]
    assert load(tokenizer, "arithmetic", eval_path=str(tmp_path / name)) == EXPECTED


def test_numbers_of_a_table_keep_their_type(tokenizer, tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "answer": [3, -4], "x": [0.5, 2.0]}), path)
    assert load(tokenizer, path) == [("a", "3"), ("b", "-4")]
    assert load(tokenizer, path, answer_field="x") == [("a", "0.5"), ("b", "2.0")]


def test_csv_answers_are_never_reinterpreted(tokenizer, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('\ufeffprompt,answer\n1+1=,2\n"größer?\nja",01\n"p,q",2024-01-01\nx,NA\nempty,\n')
    assert load(tokenizer, path) == [*EXPECTED, ("empty", "")]


@pytest.mark.parametrize(
    ("table", "fields", "row", "problem"),
    [
        ({"promt": ["a"], "answer": ["1"]}, {}, 1, "this row has no field 'prompt' (data.prompt_field); it has promt"),
        ({"prompt": ["a", None], "answer": ["1", "2"]}, {}, 2, "'prompt' is null, not text"),
        ({"prompt": ["a", "b"], "answer": [["1"], ["2"]]}, {}, 1, "not text or a number"),
        ({"prompt": ["a", "b" * 50], "answer": ["1", "2"]}, {}, 2, "50 tokens"),
        ({"prompt": ["a", "b"], "answer": ["#1", "2"]}, {"answer_after": "#"}, 2, "has no '#'"),
    ],
)
def test_what_is_wrong_with_a_row_names_it(tokenizer, tmp_path, table, fields, row, problem):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(ConfigError) as caught:
        load(tokenizer, path, **fields)
    assert problem in caught.value.problem
    assert caught.value.where == f"{path}, row {row}"


@pytest.mark.parametrize("ending", ["parquet", "arrow", "csv"])
def test_a_file_that_is_not_what_its_ending_says(tokenizer, tmp_path, ending):
    path = tmp_path / f"data.{ending}"
    path.write_bytes(b"\x89PNG\xff\xfe\x00" * 10)
    with pytest.raises(ConfigError, match=f"can't be read as {ending}"):
        load(tokenizer, path)


def test_a_missing_table_is_named_with_its_neighbour(tokenizer, tmp_path):
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ConfigError, match="does not exist") as caught:
        load(tokenizer, tmp_path / "trian.parquet")
    assert "train.parquet" in caught.value.fix


def test_a_name_of_the_hub_is_loaded_with_its_subset_and_split(tokenizer, monkeypatch):
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load(tokenizer, "owner/set-1", limit=3) == EXPECTED[:3]
    assert load(tokenizer, "owner/set", subset="main", split="dev") == EXPECTED
    assert load(tokenizer, "owner/set", subset="main", eval_path="other/set", eval_split="test") == EXPECTED
    assert asked == [("owner/set-1", None, "train"), ("owner/set", "main", "dev"), ("other/set", "main", "test")]


def test_a_split_that_the_hub_does_not_have_names_the_keys(tokenizer, monkeypatch):
    def load_dataset(path, name, *, split):
        raise ValueError(f'Unknown split "{split}". Should be one of ["train"].')

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConfigError, match='Unknown split "test"') as caught:
        load(tokenizer, "arithmetic", eval_path="owner/set", eval_split="test")
    assert "eval.split (test)" in caught.value.fix


def test_an_offline_machine_says_so(tmp_path):
    script = textwrap.dedent(
        """
        from qerl_rl.config.errors import ConfigError
        from qerl_rl.data.tables import hub_entries
        try:
            list(hub_entries("owner/set", subset="", split="train", key="data.train_path", split_key="data.split"))
        except ConfigError as error:
            print(error)
        """
    )
    offline = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, check=True)
    assert "data.train_path=owner/set can't be loaded from the hub" in done.stdout
    assert "set data.train_path to a file on this machine" in done.stdout
    assert done.stdout.count("\n") == 1
