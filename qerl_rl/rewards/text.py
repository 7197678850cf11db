"""Finding answers in text, without judging them."""

from __future__ import annotations

import re

_MARK = "####"
_BOX_OR_BRACE = re.compile(r"\\boxed\{|[{}]")
_ANSWER_LINE = re.compile(r"\banswer[ \t]*:[ \t]*([^\n]*)", re.IGNORECASE)


def boxes(text: str) -> list[str]:
    """Contents of the complete \\boxed{...} of `text`, in the order of their beginnings."""
    return [text[begin:end] for begin, end in sorted(_box_spans(text))]


def last_box(text: str) -> str | None:
    """Content of the complete \\boxed{...} that begins last, stripped; None without one."""
    begin, end = max(_box_spans(text), default=(-1, -1))
    return text[begin:end].strip() if begin >= 0 else None


def _box_spans(text: str) -> list[tuple[int, int]]:
    # Places and not texts: boxes within boxes would take memory with the square of the text's length.
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0] != "}":
            opened.append(None if token[0] == "{" else token.end())
        elif opened and (begin := opened.pop()) is not None:
            found.append((begin, token.start()))
    return found


def marked_answer(text: str) -> str | None:
    """What the text marks as its answer: its last \\boxed{...}, else what follows its last `####`; stripped."""
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition(_MARK)
    return after.strip() if mark else None


def final_answer(text: str) -> str:
    """The last \\boxed{...} content of `text`, else what follows its last `####`, else all of it; stripped."""
    marked = marked_answer(text)
    return text.strip() if marked is None else marked


def answer_line(text: str) -> str | None:
    """What follows the last `Answer:` on its line, stripped; None without one."""
    found = _ANSWER_LINE.findall(text)
    return found[-1].strip() if found else None
