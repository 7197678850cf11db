"""Rewards for mathematical answers, compared by value with math-verify."""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

from qerl_rl.rewards.text import answer_line, final_answer, last_box, marked_answer

# It warns that its own alarm is off; the scorer limits the time of a sample, and an alarm works in main threads only.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_THOUGHT_THEN_BOXED_ANSWER = ("<think>", "</think>", "<answer>", "\\boxed{", "</answer>")
_VARIABLE = re.compile(r"[A-Za-z]\s*[-+*^=]|[-+*^=]\s*[A-Za-z]|\d[A-Za-z]|[A-Za-z]/\d")
"""2x or x + 1, of which math-verify would find the number alone outside of LaTeX's delimiters."""
_WORD = re.compile(r"[A-Za-z]{2}")
_DAPO_TAIL = 300
_RETOOL_TAIL = 100


def math(prompt: str, response: str, answer: str) -> float:
    """1.0 when the response's final answer has the value of `answer`, else 0.0 (math-verify 0.9; 0.5 = 1/2 = \\frac12).

    What counts as the final answer, in the response as in `answer`: the content of the last \\boxed{...}; without one,
    what follows the last `####` (GSM8K); without one, what math-verify finds: a stated "answer is ..." first, else the
    last expression or number. Units, currency signs and thousands separators are ignored. An answer without any number
    or formula must be equal as text.
    """
    return float(_equal(final_answer(response), final_answer(answer)))


def boxed_math(prompt: str, response: str, answer: str) -> float:
    """`math` of the last \\boxed{...} alone: 0.0 without a box."""
    boxed = last_box(response)
    return float(boxed is not None and _equal(boxed, final_answer(answer)))


def structured_math(prompt: str, response: str, answer: str) -> float:
    """`boxed_math` of a response that reads <think>..</think>..<answer>..\\boxed{..}..</answer>; 0.0 of any other."""
    begin, end = _THOUGHT_THEN_BOXED_ANSWER[0], _THOUGHT_THEN_BOXED_ANSWER[-1]
    if not (response.startswith(begin) and response.endswith(end) and _in_order(response, _THOUGHT_THEN_BOXED_ANSWER)):
        return 0.0
    return boxed_math(prompt, response, answer)


def graded_math(prompt: str, response: str, answer: str) -> float:
    """`boxed_math` in three grades: 1.0 right, -0.5 wrong in a box, -1.0 without a box."""
    boxed = last_box(response)
    if boxed is None:
        return -1.0
    return 1.0 if _equal(boxed, final_answer(answer)) else -0.5


def answer_line_math(prompt: str, response: str, answer: str) -> float:
    """1.0 when the last line `Answer: ...` in the response's last 300 characters has the value of `answer`, else -1.0
    (the prompt and the scores of DAPO, arXiv 2503.14476)."""
    stated = answer_line(response[-_DAPO_TAIL:])
    return 1.0 if stated is not None and _equal(final_answer(stated), final_answer(answer)) else -1.0


def boxed_text(prompt: str, response: str, answer: str) -> float:
    """1.0 when a \\boxed{...} in the response's last 100 characters holds `answer` letter by letter, else -1.0."""
    return 1.0 if last_box(response[-_RETOOL_TAIL:]) == final_answer(answer) else -1.0


def same_answer(prompt: str, response: str, answer: str) -> float:
    """1.0 when both texts hold an answer and `math` takes the two for the same, else 0.0.

    A text without a \\boxed{...}, a `####` or any number or formula holds none; compared with itself, it scores 0.
    """
    for text in (response, answer):
        if not marked_answer(text) and not _values(final_answer(text)):
            return 0.0
    return math(prompt, response, answer)


def _equal(given: str, expected: str) -> bool:
    gold = _values(expected)
    if not gold:
        return expected.casefold() == given.casefold()
    return bool(verify(gold, _values(given), timeout_seconds=None))


def _in_order(text: str, parts: tuple[str, ...]) -> bool:
    position = 0
    for part in parts:
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _values(text: str) -> list:
    # LaTeX is only recognised inside its delimiters, which boxed content and gold answers come without.
    delimited = any(mark in text for mark in ("$", "\\(", "\\["))
    formula = "\\" in text or (_VARIABLE.search(text) and not _WORD.search(text))
    return parse(f"${text}$" if formula and not delimited else text, parsing_timeout=None)
