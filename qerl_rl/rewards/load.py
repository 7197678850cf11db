"""From the names in `reward.function` and `reward.functions` to the functions."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from qerl_rl.config.dotted import find_function
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RewardConfig

RewardFunction = Callable[[str, str, str], float]
"""(prompt, response, answer) -> reward; any finite number."""

_MATH = "qerl_rl.rewards.math_answer."
_STRUCTURE = "qerl_rl.rewards.structure."
LENGTH = "length"
"""The one reward that depends on a key of its own, reward.length_characters."""
OWN = {
    "exact": "qerl_rl.rewards.exact.exact",
    "math": _MATH + "math",
    "boxed_math": _MATH + "boxed_math",
    "structured_math": _MATH + "structured_math",
    "graded_math": _MATH + "graded_math",
    "answer_line_math": _MATH + "answer_line_math",
    "boxed_text": _MATH + "boxed_text",
    "format": _STRUCTURE + "format",
    "strict_format": _STRUCTURE + "strict_format",
    "step": _STRUCTURE + "step",
}
MINDSPEED = {
    "acc": "graded_math",
    "base_acc": "structured_math",
    "math_17k_acc": "boxed_math",
    "acc_for_dapo": "answer_line_math",
    "acc_for_ppo": "boxed_math",
    "math_verify_reward": "structured_math",
    "retool_reward": "boxed_text",
}
"""MindSpeed-RL's names of verifiers, where they differ from the names here (format, strict_format, step don't)."""
BUILTIN = OWN | {name: OWN[own] for name, own in MINDSPEED.items()}
NEVER_JUDGE = frozenset({"format", "strict_format", "step", LENGTH})
"""Rewards that don't look at the answer."""
IN_PROCESS = NEVER_JUDGE | {"exact"}
"""Rewards that can neither hang nor die, and so need no process of their own."""


def load_rewards(reward: RewardConfig) -> dict[str, RewardFunction]:
    """The functions of the section `reward`, by name.

    Raises: ConfigError as `load_reward` does.
    """
    functions = {name: load_reward(name) for name in reward.weights if name != LENGTH}
    if LENGTH in reward.weights:
        functions[LENGTH] = length_reward(reward.length_characters)
    return functions


def length_reward(characters: int) -> RewardFunction:
    """The reward `length`: the response's length as a share of `characters`, at most 1.0; weigh it negatively for brief
    answers."""

    def length(prompt: str, response: str, answer: str) -> float:
        return min(1.0, len(response) / characters)

    return length


def load_reward(name: str) -> RewardFunction:
    """The function of that name: one of BUILTIN, or `package.module.function` found on sys.path.

    Raises: ConfigError when there is no such name, module or function, the module fails to import, or the function
        can't be called with (prompt, response, answer).
    """
    if name not in BUILTIN and "." not in name:
        known = [*OWN, LENGTH]
        near = difflib.get_close_matches(name, [*known, *MINDSPEED], n=1) or [f"one of {', '.join(known)}"]
        raise ConfigError(
            f"{name!r} is not a known reward.",
            fix=f"set it to {near[0]}, or to a dotted path package.module.function",
        )
    # The ones of this package are imported on demand as well: math needs what a run with `exact` never loads.
    return find_function("reward", BUILTIN.get(name, name), {}, ("prompt", "response", "answer"))
