"""From the name of a function in a launch file to the function."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from qerl_rl.config.errors import ConfigError


def find_function(
    key: str, name: str, builtin: Mapping[str, Callable[..., Any]], parameters: Sequence[str]
) -> Callable[..., Any]:
    """The function that `key` names: one of `builtin`, or `package.module.function` found on sys.path.

    Args: parameters: what it is called with, by position; their names go into the error.
    Raises: ConfigError when there is no such name, module or function, the module fails to import, or the function
        can't be called that way.
    """
    if name in builtin:
        return builtin[name]
    if "." not in name:
        near = difflib.get_close_matches(name, builtin, n=1, cutoff=0.5) or [" or ".join(builtin)]
        raise ConfigError(
            f"{key}={name} is unknown.", fix=f"set {key} to {near[0]}, or to a dotted path package.module.function"
        )
    module_name, _, function_name = name.rpartition(".")
    module = _import(key, name, module_name)
    function = getattr(module, function_name, None)
    where = getattr(module, "__file__", None) or module_name
    if not callable(function):
        known = [item for item, value in vars(module).items() if callable(value) and not item.startswith("_")]
        near = difflib.get_close_matches(function_name, known, n=1) or [f"one of {', '.join(known) or 'its functions'}"]
        raise ConfigError(
            f"{key}={name}: {module_name} has no function {function_name}.", fix=f"name {near[0]} instead", where=where
        )
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise ConfigError(
            f"{key}={name} can't be called with ({', '.join(parameters)}): {error}.",
            fix="let it take these, in this order",
            where=where,
        ) from None
    return function


def _import(key: str, name: str, module_name: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that exists but imports something missing is another mistake than a wrong name.
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            problem, fix = f"there is no module {error.name}", "correct the name, or put its folder in PYTHONPATH"
        else:
            problem, fix = f"{module_name} imports {error.name}, which is not installed", f"install {error.name}"
        raise ConfigError(f"{key}={name}: {problem}.", fix=fix) from None
    except Exception as error:
        raise ConfigError(
            f"{key}={name}: importing {module_name} raised {type(error).__name__}: {error}.",
            fix=f"make `import {module_name}` work",
        ) from error
