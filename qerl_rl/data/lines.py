"""Reading a JSON-lines file, with the line number in every error."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.data.records import Entry


def line_entries(path: str, *, key: str) -> Iterator[Entry]:
    """The objects of a file with one JSON object a line; empty lines are skipped.

    Plain `json` and not the `datasets` reader: type inference over a column turns the answers 1 and "2024-01-01" into
    1.0 and a time stamp, and its errors know no line numbers.

    Args: key: the configuration key of `path`, for errors.
    Raises: ConfigError when the file is missing or not text, or a line is no JSON object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if text.strip():
                    place = f"{path}:{number}"
                    yield Entry(place, _object(text, place), "line")
    except OSError as error:
        raise unreadable(path, key, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.", fix="convert it to JSON lines in UTF-8", where=path) from error


def _object(text: str, where: str) -> dict[str, Any]:
    fix = "write one JSON object a line"
    if text.lstrip().startswith("["):
        fix += ", without the list around them (`jq -c '.[]' FILE` does that)"
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"this line is not readable JSON: {error.msg} at column {min(error.pos, len(text.rstrip())) + 1}.",
            fix=fix,
            where=where,
        ) from error
    if not isinstance(entry, dict):
        raise ConfigError(f"this line is a JSON {type(entry).__name__}, not an object.", fix=fix, where=where)
    return entry


def unreadable(path: str, key: str, error: OSError) -> ConfigError:
    """What to say about a file that can't be opened."""
    if not path:
        return ConfigError(f"{key} is empty.", fix=f"set {key} to a .jsonl file, or to `arithmetic`")
    place = Path(path)
    if not isinstance(error, FileNotFoundError):
        return ConfigError(f"{key}={path} can't be read: {error.strerror}.", fix="make it a readable file")
    neighbours = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, neighbours, n=1)
    fix = f"set {key} to {place.parent / near[0]}" if near else f"set {key} to an existing .jsonl file"
    return ConfigError(f"{key}={path} does not exist (from {Path.cwd()}).", fix=fix)
