"""Reading the text fields of a JSON-lines file, with the line number in every error."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError


@dataclass(frozen=True)
class Record:
    """The prompt and the answer of one line, as they are in the file."""

    line: int
    """Counted from 1."""
    prompt: str
    answer: str


def read_records(path: str, *, prompt_field: str, answer_field: str, limit: int, key: str) -> list[Record]:
    """The records of a file with one JSON object a line; empty lines are skipped.

    Plain `json` and not the `datasets` reader: type inference over a column turns the answers 1 and "2024-01-01" into
    1.0 and a time stamp, and its errors know no line numbers.

    Args: limit: stop after so many records; 0 reads all. key: the configuration key of `path`, for errors.
    Raises: ConfigError when the file is missing, empty or not text, or a line is no JSON object, lacks a field, or has
        something else than text (for answers: text or a number) in it.
    """
    records: list[Record] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                if limit and len(records) == limit:
                    break
                if not text.strip():
                    continue
                where = f"{path}:{number}"
                entry = _object(text, where)
                prompt = _field(entry, prompt_field, "data.prompt_field", where)
                answer = _field(entry, answer_field, "data.answer_field", where)
                if not isinstance(prompt, str) or not prompt:
                    raise _wrong_type(prompt_field, prompt, "text", where)
                if isinstance(answer, bool) or not isinstance(answer, str | int | float):
                    raise _wrong_type(answer_field, answer, "text or a number", where)
                records.append(Record(number, prompt, str(answer)))
    except OSError as error:
        raise _unreadable(path, key, error) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text.", fix="convert it to JSON lines in UTF-8", where=path) from error
    if not records:
        raise ConfigError(f"{path} has no lines.", fix=f"set {key} to a file with one JSON object a line", where=path)
    return records


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


def _field(entry: dict[str, Any], field: str, key: str, where: str) -> Any:
    if field in entry:
        return entry[field]
    near = difflib.get_close_matches(field, entry, n=1)
    raise ConfigError(
        f"this line has no field {field!r} ({key}); it has {', '.join(entry) or 'none'}.",
        fix=f"set {key} to {near[0] if near else 'the field that holds it'}, or correct the line",
        where=where,
    )


def _wrong_type(field: str, value: Any, expected: str, where: str) -> ConfigError:
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return ConfigError(
        f"the field {field!r} is {shown}, not {expected}.", fix="correct or remove the line", where=where
    )


def _unreadable(path: str, key: str, error: OSError) -> ConfigError:
    if not path:
        return ConfigError(f"{key} is empty.", fix=f"set {key} to a .jsonl file, or to `arithmetic`")
    place = Path(path)
    if not isinstance(error, FileNotFoundError):
        return ConfigError(f"{key}={path} can't be read: {error.strerror}.", fix="make it a readable .jsonl file")
    neighbours = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, neighbours, n=1)
    fix = f"set {key} to {place.parent / near[0]}" if near else f"set {key} to an existing .jsonl file"
    return ConfigError(f"{key}={path} does not exist (from {Path.cwd()}).", fix=fix)
