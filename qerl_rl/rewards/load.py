"""From the name in `reward.function` to the function."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType

from qerl_rl.config.errors import ConfigError

RewardFunction = Callable[[str, str, str], float]
"""(prompt, response, answer) -> reward; any finite number."""

BUILTIN = {
    "exact": "qerl_rl.rewards.exact.exact",
    "math": "qerl_rl.rewards.math_answer.math",
}
IN_PROCESS = frozenset({"exact"})
"""Rewards that can neither hang nor die, and so need no process of their own."""


def load_reward(name: str) -> RewardFunction:
    """The function that `reward.function` names: one of BUILTIN, or `package.module.function` found on sys.path.

    Raises: ConfigError when there is no such name, module or function, the module fails to import, or the function
        can't be called with (prompt, response, answer).
    """
    if name not in BUILTIN and "." not in name:
        near = difflib.get_close_matches(name, BUILTIN, n=1) or [" or ".join(BUILTIN)]
        raise ConfigError(
            f"reward.function={name!r} is not a known reward.",
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
            f"reward.function={name!r}: {module_name} has no function {function_name!r}.",
            fix=f"name {near[0]} instead",
            where=where,
        )
    try:
        inspect.signature(function).bind("prompt", "response", "answer")
    except TypeError as error:
        raise ConfigError(
            f"reward.function={name!r} can't be called with (prompt, response, answer): {error}.",
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
                f"reward.function={name!r}: there is no module {error.name!r}.",
                fix=f"correct the name, or put the folder that holds it in PYTHONPATH (now in {os.getcwd()})",
            ) from error
        raise ConfigError(
            f"reward.function={name!r}: {module_name} imports {error.name!r}, which is not installed.",
            fix=f"install {error.name}, or name another function",
        ) from error
    except Exception as error:
        raise ConfigError(
            f"reward.function={name!r}: importing {module_name} raised {type(error).__name__}: {error}.",
            fix=f"make `import {module_name}` work",
        ) from error
