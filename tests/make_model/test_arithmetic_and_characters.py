"""Generated sums are right and repeatable; the tokenizer gives back every text it can hold."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qerl_rl.data.arithmetic import arithmetic_problems
from qerl_rl.make_model.characters import CHARACTERS, character_tokenizer
from qerl_rl.make_model.random_model import MoeSizes, build_moe, save_model

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@given(seed=st.integers(0, 2**31), operators=st.sampled_from(["+", "+-", "*", "+-*"]))
def test_every_answer_is_right_and_no_operand_leaves_its_length(seed: int, operators: str) -> None:
    for prompt, answer in arithmetic_problems(20, seed, digits=(1, 3), operators=operators):
        left, sign, right = re.fullmatch(r"(\d+)([+*-])(\d+)=", prompt).groups()  # type: ignore[union-attr]
        assert sign in operators
        assert int(answer) == OPERATIONS[sign](int(left), int(right)) >= 0
        assert {len(left), len(right)} <= {1, 3}


def test_problems_depend_on_the_seed_alone() -> None:
    assert arithmetic_problems(50, 1) == arithmetic_problems(50, 1)
    assert arithmetic_problems(50, 1)[:20] == arithmetic_problems(20, 1)
    assert arithmetic_problems(50, 1) != arithmetic_problems(50, 2)


@pytest.fixture(scope="module")
def saved_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> AutoTokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tokenizer = character_tokenizer()
    save_model(build_moe("qwen3_moe", MoeSizes(layers=1), tokenizer), tokenizer, folder)
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text(alphabet=CHARACTERS, min_size=1, max_size=60))
def test_saved_tokenizer_gives_back_every_text_one_token_a_character(saved_tokenizer, text: str) -> None:
    tokens = saved_tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert saved_tokenizer.decode(tokens) == text
    assert tokens == character_tokenizer().encode(text)


def test_special_tokens_end_answers_and_vanish_from_decoded_text(saved_tokenizer) -> None:
    tokens = [*saved_tokenizer.encode("46"), saved_tokenizer.eos_token_id, saved_tokenizer.pad_token_id]
    assert saved_tokenizer.decode(tokens, skip_special_tokens=True) == "46"
    assert len(saved_tokenizer) == 100
    assert saved_tokenizer.encode("é") == [saved_tokenizer.unk_token_id]
