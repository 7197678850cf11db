"""Which of several responses to a prompt give the same answer, in the sense of the reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qerl_rl.rewards.load import MINDSPEED, NEVER_JUDGE
from qerl_rl.rewards.scorer import RewardScorer
from qerl_rl.rewards.text import answer_line, final_answer, last_box, marked_answer

SAME_VALUE = "qerl_rl.rewards.math_answer.same_answer"
"""Compares two answers as math does; runs where rewards run, since it can hang as they can."""


@dataclass(frozen=True)
class Comparison:
    """How the answers of one reward are compared."""

    answer: Callable[[str], str | None]
    """The text that holds the response's answer; None when there is no answer."""
    by_value: bool
    """Equal values are the same answer (SAME_VALUE), not only equal texts."""


def _marked(content: str | None) -> str | None:
    # Of what else the response says nothing is kept, so that equal answers become equal texts.
    return None if content is None else f"#### {content}"


def _math(response: str) -> str:
    return _marked(marked_answer(response)) or response.strip()


def _boxed(response: str) -> str | None:
    return _marked(last_box(response))


def _answer_line(response: str) -> str | None:
    stated = answer_line(response)
    return None if stated is None else _marked(final_answer(stated))


_COMPARISONS = {
    "exact": Comparison(str.strip, by_value=False),
    "math": Comparison(_math, by_value=True),
    "boxed_math": Comparison(_boxed, by_value=True),
    "structured_math": Comparison(_boxed, by_value=True),
    "graded_math": Comparison(_boxed, by_value=True),
    "answer_line_math": Comparison(_answer_line, by_value=True),
    "boxed_text": Comparison(_boxed, by_value=False),
}
_OF_OTHERS = Comparison(final_answer, by_value=False)


def judge_of(weights: Mapping[str, float]) -> str:
    """The function that says which answers are right: the first that looks at answers, or the first of all."""
    return next((name for name in weights if name not in NEVER_JUDGE), next(iter(weights)))


def comparison_of(name: str) -> Comparison:
    """How the reward `name` compares answers; one of the user's by the text of the final answer (box, ####, or all)."""
    return _COMPARISONS.get(MINDSPEED.get(name, name), _OF_OTHERS)


def group_answers(
    prompts: Sequence[tuple[str, Sequence[str]]], comparison: Comparison, scorer: RewardScorer
) -> list[list[int | None]]:
    """For each (prompt, responses) the number of each response's answer, equal for the same answer; None without one.

    Each answer is compared with the first of each group there is, in the order of the responses, so the numbers follow
    from the responses alone. Only the different texts are compared, those of all prompts at once.

    Args: scorer: made with SAME_VALUE among its companions if comparison.by_value.
    """
    texts = [[comparison.answer(response) or None for response in responses] for _, responses in prompts]
    groups: list[dict[str, int | None]] = [{} for _ in prompts]
    waiting = [list(dict.fromkeys(text for text in own if text is not None)) for own in texts]
    number = 0
    while any(waiting):
        pairs = [(row, own[0], text) for row, own in enumerate(waiting) for text in own]
        same = _same([(prompts[row][0], text, first) for row, first, text in pairs], comparison, scorer)
        for (row, first, text), equal in zip(pairs, same, strict=True):
            # The first is compared with itself as well: a text without an answer in it is not even its own equal.
            if equal or text == first:
                groups[row][text] = number if equal else None
        waiting = [[text for text in own if text not in groups[row]] for row, own in enumerate(waiting)]
        number += 1
    return [[None if text is None else groups[row][text] for text in own] for row, own in enumerate(texts)]


def _same(pairs: list[tuple[str, str, str]], comparison: Comparison, scorer: RewardScorer) -> list[bool]:
    if not comparison.by_value:
        return [text == first for _, text, first in pairs]
    values, _ = scorer.apply(SAME_VALUE, pairs)
    return [value == 1.0 for value in values]
