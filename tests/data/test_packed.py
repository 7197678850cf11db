"""Prompts that are tokens already, in the files that Megatron's own builder writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.packed import is_packed, read_packed
from qerl_rl.data.prompts import load_prompts
from tests.ranks import RankPool

DOCUMENTS = {"input_ids": [[1, 5, 7, 2], [3], [9] * 12], "labels": [[4, 6], [8], [5, 5]]}


def build(prefix: str, documents: dict[str, list[list[int]]], dtype: str) -> None:
    """Write the columns with Megatron's IndexedDatasetBuilder."""
    import torch

    from qerl_rl.platform import detect, prepare_megatron

    prepare_megatron(detect("cpu"))
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for column, rows in documents.items():
        builder = IndexedDatasetBuilder(f"{prefix}_packed_{column}_document.bin", dtype=getattr(np, dtype))
        for row in rows:
            builder.add_item(torch.tensor(row, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}_packed_{column}_document.idx")


@pytest.fixture
def prefix(tmp_path: Path, one_rank: RankPool) -> str:
    prefix = str(tmp_path / "prompts")
    one_rank(build, prefix, DOCUMENTS, "int32")
    return prefix


class Letters:
    """A tokenizer whose token n is the n-th letter; 9 is special."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + token) for token in tokens if token != 9)


def load(prefix: str, longest: int = 16, **data: object) -> object:
    return load_prompts(
        DataConfig(train_path=prefix, **data), Letters(), max_prompt_tokens=longest, seed=0, count_needed=1
    )


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_documents_are_read_as_megatron_wrote_them(tmp_path: Path, one_rank: RankPool, dtype: str) -> None:
    prefix = str(tmp_path / dtype)
    assert not is_packed(prefix)
    one_rank(build, prefix, DOCUMENTS, dtype)
    assert is_packed(prefix)
    for column, rows in DOCUMENTS.items():
        assert [tokens.tolist() for tokens in read_packed(prefix, column)] == rows
        assert all(tokens.dtype == np.dtype(dtype) for tokens in read_packed(prefix, column))


def test_prompts_keep_their_tokens_and_rewards_see_text(prefix: str) -> None:
    loaded = load(prefix)
    assert [prompt.tokens.tolist() for prompt in loaded.prompts] == DOCUMENTS["input_ids"]
    assert loaded.prompts[0].tokens.dtype == np.int32
    assert [(prompt.text, prompt.answer) for prompt in loaded.prompts] == [("bfhc", "eg"), ("d", "i"), ("", "ff")]


def test_longer_prompts_are_left_out_where_asked_and_an_error_where_not(prefix: str) -> None:
    loaded = load(prefix, max_prompt_tokens=4)
    assert ([prompt.index for prompt in loaded.prompts], loaded.left_out) == ([0, 1], 1)
    assert len(load(prefix, limit=2).prompts) == 2
    with pytest.raises(ConfigError, match="document 3"):
        load(prefix, longest=8)
    with pytest.raises(ConfigError, match="to 4 or more"):
        load(prefix, max_prompt_tokens=1, limit=1)


@pytest.mark.parametrize("key", ["chat_template", "instruction"])
def test_nothing_can_be_written_into_tokens(prefix: str, key: str) -> None:
    given = {"chat_template": True, "instruction": "Think."}[key]
    with pytest.raises(ConfigError, match=f"data.{key} can't be put into"):
        load(prefix, **{key: given})


def damage(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [
        ("idx", lambda content: b"x" + content[1:], "is no index of tokens"),
        ("idx", lambda content: content[:12], "is no index of tokens"),
        ("idx", lambda content: content[:9] + b"\x02" + content[10:], "version 2"),
        ("idx", lambda content: content[:40], "ends before its 3 sequences"),
        ("bin", lambda content: content[:-4], "shorter than its index says"),
    ],
)
def test_a_damaged_file_is_named(prefix: str, kind: str, change: Callable[[bytes], bytes], problem: str) -> None:
    damage(Path(f"{prefix}_packed_labels_document.{kind}"), change)
    with pytest.raises(ConfigError, match=problem):
        load(prefix)


def test_a_missing_column_is_named(prefix: str) -> None:
    Path(f"{prefix}_packed_labels_document.bin").unlink()
    with pytest.raises(ConfigError, match=r"there is no .*labels_document\.bin"):
        load(prefix)


def test_each_prompt_has_an_answer(prefix: str, one_rank: RankPool) -> None:
    one_rank(build, prefix, {"labels": DOCUMENTS["labels"][:2]}, "int32")
    with pytest.raises(ConfigError, match="3 prompts and 2 answers"):
        load(prefix)


def test_other_paths_are_none_of_these() -> None:
    assert not is_packed("")
    assert not is_packed(dataclasses.replace(DataConfig(), train_path="arithmetic").train_path)
