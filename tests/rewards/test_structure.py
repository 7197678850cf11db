import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.config.schema import RewardConfig
from qerl_rl.rewards import load_reward, load_rewards
from qerl_rl.rewards.structure import format, step, strict_format
from qerl_rl.rewards.text import answer_line, boxes, last_box, marked_answer

FRAMED = "<think>2 and 2</think>\n<answer>so \\boxed{4}</answer>"
PIECES = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "\\boxed{4}", "\\boxed{", "}", "{", " ", "\n", "x"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=9).map("".join))
def test_format_is_the_regular_expression_that_defines_it(text):
    expected = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text.strip(), re.DOTALL)
    assert format("p", text, "a") == float(expected is not None)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=9).map("".join))
def test_strict_format_is_format_with_each_part_once(text):
    pattern = r"<think>.*</think>.*<answer>.*\\boxed\{[^{}]*\}.*</answer>"
    once = all(text.count(part) == 1 for part in ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{"))
    if "{" not in text.replace("\\boxed{", ""):
        expected = once and re.fullmatch(pattern, text, re.DOTALL)
        assert strict_format("p", text, "a") == (1.0 if expected else -0.5)


@pytest.mark.parametrize(
    ("text", "loose", "strict"),
    [
        (FRAMED, 1.0, 1.0),
        (f" {FRAMED}\n", 1.0, -0.5),
        (FRAMED.replace("\\boxed{4}", "4"), 1.0, -0.5),
        (FRAMED.replace("2 and 2", "\\boxed{4}"), 1.0, -0.5),
        (FRAMED.replace("so", "<think>"), 1.0, -0.5),
        (FRAMED.replace("\n", " then "), 0.0, 1.0),
        (FRAMED + " and more", 0.0, -0.5),
        ("<answer>\\boxed{4}</answer><think></think>", 0.0, -0.5),
        ("", 0.0, -0.5),
    ],
)
def test_shapes(text, loose, strict):
    assert (format("p", text, "a"), strict_format("p", text, "a")) == (loose, strict)


def test_steps_count_up_to_three():
    assert step("p", "Just 4.", "a") == 0.0
    assert step("p", "First, this.\nIt is 4.", "a") == pytest.approx(1 / 3)
    assert step("p", "1. this\n2. that", "a") == pytest.approx(2 / 3)
    assert step("p", "Step 1: a Step 2: b\n- c\n* d\nFinally, e", "a") == 1.0


def test_length_is_a_share_of_the_key_and_at_most_one():
    (length,) = load_rewards(RewardConfig(function="length", length_characters=200)).values()
    assert [length("p", "x" * count, "a") for count in (0, 50, 200, 5000)] == [0.0, 0.25, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{a} and \\boxed{b{c}d}", ["a", "b{c}d"]),
        ("\\boxed{a \\boxed{b}}", ["a \\boxed{b}", "b"]),
        ("\\boxed{a} } \\boxed{b", ["a"]),
        ("{ \\boxed{3}", ["3"]),
        ("\\boxed{x{3}", []),
        ("boxed{3}", []),
    ],
)
def test_boxes_are_matched_by_their_braces(text, found):
    assert boxes(text) == found
    assert last_box(text) == (found[-1] if found else None)


def test_boxes_in_boxes_take_no_more_memory_than_the_text():
    text = "\\boxed{" * 20000 + "4" + "}" * 20000
    tracemalloc.start()
    try:
        assert last_box(text) == "4"
        assert strict_format("p", f"<think></think><answer>{text}</answer>", "4") == -0.5
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The texts of all boxes together would be 20000 * 80000 characters.
    assert peak < 50e6


def test_marks_of_answers():
    assert marked_answer("4") is None
    assert marked_answer("1 #### 2 #### 3 ") == "3"
    assert marked_answer("#### 2 \\boxed{ 3 }") == "3"
    assert answer_line("Answer: 3\nanswer : 4 \nThe answer is 5") == "4"
    assert answer_line("answers: 3") is None


# Response, answer -> what each of MindSpeed-RL's verifiers gives (mindspeed_rl/models/rule_verifier.py): the grades
# are theirs, derived by hand from their definitions.
NAMES = ("acc", "base_acc", "math_17k_acc", "acc_for_dapo", "acc_for_ppo", "math_verify_reward", "retool_reward")
GRADES = [
    (FRAMED, (1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0)),
    (FRAMED.replace("4", "5"), (-0.5, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0)),
    ("\\boxed{4}", (1.0, 0.0, 1.0, -1.0, 1.0, 0.0, 1.0)),
    ("\\boxed{4.0}", (1.0, 0.0, 1.0, -1.0, 1.0, 0.0, -1.0)),
    ("so it is\nAnswer: 4", (-1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0)),
    ("Answer: 4" + "x" * 400, (-1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0)),
    ("\\boxed{4}" + "x" * 200, (1.0, 0.0, 1.0, -1.0, 1.0, 0.0, -1.0)),
    ("4", (-1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0)),
    ("", (-1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -1.0)),
]


@pytest.mark.parametrize(("response", "grades"), GRADES)
def test_names_of_mindspeed_verifiers_give_their_grades(response, grades):
    assert tuple(load_reward(name)("p", response, "4") for name in NAMES) == grades
