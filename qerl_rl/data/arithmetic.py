"""Sums to solve: a task that needs no download and whose every answer can be checked."""

from __future__ import annotations

import random


def arithmetic_problems(
    count: int, seed: int, *, digits: tuple[int, ...] = (1, 2), operators: str = "+"
) -> list[tuple[str, str]]:
    """`count` problems such as ("12+34=", "46"), the same for the same arguments; repeats are possible.

    Args: digits: each operand has one of these lengths, drawn anew for each operand. operators: one is drawn for each
    problem out of + - *; a difference is never negative.
    """
    draw = random.Random(seed)

    def operand() -> int:
        length = draw.choice(digits)
        return draw.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)

    problems = []
    for _ in range(count):
        left, right, operator = operand(), operand(), draw.choice(operators)
        if operator == "-":
            left, right = max(left, right), min(left, right)
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        problems.append((f"{left}{operator}{right}=", str(result)))
    return problems


def with_wrong_digits(problems: list[tuple[str, str]], share: float, seed: int) -> list[tuple[str, str]]:
    """The problems, each with probability `share` with one digit of its answer replaced by another."""
    draw = random.Random(seed)
    spoiled = []
    for prompt, answer in problems:
        if draw.random() < share:
            place = draw.choice([index for index, character in enumerate(answer) if character.isdigit()])
            digit = draw.choice([digit for digit in "0123456789" if digit != answer[place]])
            answer = answer[:place] + digit + answer[place + 1 :]
        spoiled.append((prompt, answer))
    return spoiled
