"""Data sets that a function of the user gives, named by its dotted path."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

from qerl_rl.config.dotted import find_function
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.records import Entry
from qerl_rl.data.tables import FILE_ENDINGS

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def is_function_name(path: str) -> bool:
    """Whether `path` reads package.module.function: no file or folder is there, and it has no ending of a data file."""
    is_file = Path(path).suffix.lower() in FILE_ENDINGS or Path(path).exists()
    return bool(_DOTTED.fullmatch(path)) and not is_file


def function_entries(name: str, data: DataConfig, split: str, *, key: str) -> Iterator[Entry]:
    """The rows that the function `name` gives when called with (data, split): dictionaries, such as a datasets.Dataset.

    Args: data: the section of the launch file. split: data.split or eval.split. key: the configuration key of `name`,
        for errors.
    Raises: ConfigError when there is no such function, it raises, or it gives something else.
    """
    try:
        function = find_function(key, name, {}, ("data", "split"))
    except ConfigError as error:
        files = f"a file is named by its ending, one of {', '.join(FILE_ENDINGS)}"
        raise ConfigError(error.problem, fix=f"{error.fix} ({files})", where=error.where) from error
    try:
        for number, values in enumerate(function(data, split), start=1):
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"row {number} of {key}={name} is {_shown(values)}, not a dictionary.",
                    fix="let the function return the rows of one split, each a dictionary with a value by field",
                )
            yield Entry(f"{name}, row {number}", values, "row")
    except ConfigError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{key}={name} raised {type(error).__name__}: {' '.join(str(error).split())[:200]}.",
            fix="let the function return an iterable of dictionaries for (data, split)",
            where=f"{frame.filename}:{frame.lineno}",
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
