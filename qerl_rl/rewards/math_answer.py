"""The reward for mathematical answers, compared by value with math-verify."""

from __future__ import annotations

import logging

from math_verify import parse, verify

# It warns that its own alarm is off; the scorer limits the time of a sample, and an alarm works in main threads only.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX = "\\boxed{"
_MARK = "####"


def math(prompt: str, response: str, answer: str) -> float:
    """1.0 when the response's final answer has the value of `answer`, else 0.0 (math-verify 0.9; 0.5 = 1/2 = \\frac12).

    What counts as the final answer, in the response as in `answer`: the content of the last \\boxed{...}; without one,
    what follows the last `####` (GSM8K); without one, what math-verify finds: a stated "answer is ..." first, else the
    last expression or number. Units, currency signs and thousands separators are ignored. An answer without any number
    or formula must be equal as text.
    """
    expected, given = final_answer(answer), final_answer(response)
    gold = _values(expected)
    if not gold:
        return float(expected.casefold() == given.casefold())
    return float(verify(gold, _values(given), timeout_seconds=None))


def final_answer(text: str) -> str:
    """The last \\boxed{...} content of `text`, else what follows its last `####`, else all of it; stripped."""
    boxed = _last_box(text)
    if boxed is not None:
        return boxed.strip()
    return text.rpartition(_MARK)[2].strip()


def _last_box(text: str) -> str | None:
    start = text.rfind(_BOX)
    while start >= 0:
        depth = 1
        content = start + len(_BOX)
        for position in range(content, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[content:position]
        start = text.rfind(_BOX, 0, start)
    return None


def _values(text: str) -> list:
    # LaTeX is only recognised inside its delimiters, which boxed content and gold answers come without.
    marked = f"${text}$" if "\\" in text and "$" not in text and "\\(" not in text and "\\[" not in text else text
    return parse(marked, parsing_timeout=None)
