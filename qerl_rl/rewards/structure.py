"""Rewards for the shape of a response, whatever its answer: tags and steps.

None of them can hang: each reads the text a fixed number of times.
"""

from __future__ import annotations

import re

from qerl_rl.rewards.text import boxes

_JUNCTION = re.compile(r"</think>\s*<answer>")
_STEP = re.compile(r"Step \d+:|^\d+\.|\n[-*]|\b(?:First|Second|Next|Finally),", re.MULTILINE)
_ENOUGH_STEPS = 3
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format(prompt: str, response: str, answer: str) -> float:
    """1.0 for `<think>...</think> <answer>...</answer>` and nothing around it but white space, else 0.0."""
    text = response.strip()
    first, _, _, last = _TAGS
    if not (text.startswith(first) and text.endswith(last)):
        return 0.0
    return float(_JUNCTION.search(text, len(first), len(text) - len(last)) is not None)


def strict_format(prompt: str, response: str, answer: str) -> float:
    """1.0 when `format` holds with each tag once, no white space around and one \\boxed{...} in the answer; else -0.5.

    The scores are those of MindSpeed-RL's verifier of this name.
    """
    once = all(response.count(tag) == 1 for tag in _TAGS)
    positions = [response.find(tag) for tag in _TAGS]
    framed = response.startswith(_TAGS[0]) and response.endswith(_TAGS[-1])
    if not (once and framed and positions == sorted(positions)):
        return -0.5
    inside = response[positions[2] + len(_TAGS[2]) : positions[3]]
    return 1.0 if response.count("\\boxed{") == 1 and len(boxes(inside)) == 1 else -0.5


def step(prompt: str, response: str, answer: str) -> float:
    """A third for each mark of a step (`Step 1:`, `1.` or a bullet at a line's start, `First,` ...), at most 1.0."""
    return min(1.0, len(_STEP.findall(response)) / _ENOUGH_STEPS)
