"""From the names in `reward.function` and `reward.functions` to the functions."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType

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
    module_name, _, function_name = BUILTIN.get(name, name).rpartition(".")
    module = _import(name, module_name)
    function = getattr(module, function_name, None)
    where = getattr(module, "__file__", None) or module_name
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, known, n=1) or [f"one of {', '.join(known) or 'its functions'}"]
        raise ConfigError(
            f"the reward {name!r}: {module_name} has no function {function_name!r}.",
            fix=f"name {near[0]} instead",
            where=where,
        )
    try:
        inspect.signature(function).bind("prompt", "response", "answer")
    except TypeError as error:
        raise ConfigError(
            f"the reward {name!r} can't be called with (prompt, response, answer): {error}.",
            fix="let it take these three strings, in this order, and return a number",
            where=where,
        ) from error
    return function


def _import(name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but imports something missing is another mistake than a wrong name.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"the reward {name!r}: there is no module {error.name!r}.",
                fix=f"correct the name, or put the folder that holds it in PYTHONPATH (now in {os.getcwd()})",
            ) from error
        raise ConfigError(
            f"the reward {name!r}: {module_name} imports {error.name!r}, which is not installed.",
            fix=f"install {error.name}, or name another function",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"the reward {name!r}: importing {module_name} raised {type(error).__name__}: {error}.",
            fix=f"make `import {module_name}` work",
        ) from error
