"""From the entries of a data set to prompts and answers, whatever kind of file they came from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.template import KEY, PromptTemplate


@dataclass(frozen=True)
class Entry:
    """One line of a file or row of a table, as it is there."""

    place: str
    """Where to find it, for errors: `data.jsonl:3`, or `data.parquet, row 3`; both count from 1."""
    values: Mapping[str, Any]
    unit: str
    """line or row, for errors."""


@dataclass(frozen=True)
class Record:
    """The prompt and the answer of one entry."""

    place: str
    prompt: str
    answer: str
    """In pairs: the chosen response."""
    rejected: str = ""


def to_records(entries: Iterable[Entry], data: DataConfig, *, pairs: bool = False) -> list[Record]:
    """The records of the entries, the first data.limit of them (0: all).

    Args: pairs: read data.chosen_field and data.rejected_field instead of data.answer_field.
    Raises: ConfigError when data.prompt_template is no template, or an entry lacks a field or has something else than
        text (in an answer or a template: text or a number) in it.
    """
    template = PromptTemplate(data.prompt_template) if data.prompt_template else None
    records: list[Record] = []
    for entry in entries:
        if pairs:
            answer = _text_or_number(entry, data.chosen_field, "data.chosen_field")
            rejected = _text_or_number(entry, data.rejected_field, "data.rejected_field")
        else:
            answer, rejected = _text_or_number(entry, data.answer_field, "data.answer_field"), ""
        if template is None:
            prompt = _value(entry, data.prompt_field, "data.prompt_field")
            if not isinstance(prompt, str) or not prompt:
                raise _wrong_type(entry, data.prompt_field, prompt, "text")
        else:
            prompt = template.fill({name: _text_or_number(entry, name, KEY) for name in template.fields})
        records.append(Record(entry.place, prompt, answer, rejected))
        if len(records) == data.limit:
            break
    return records


def _text_or_number(entry: Entry, field: str, key: str) -> str:
    value = _value(entry, field, key)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong_type(entry, field, value, "text or a number")
    return str(value)


def _value(entry: Entry, field: str, key: str) -> Any:
    if field in entry.values:
        return entry.values[field]
    near = difflib.get_close_matches(field, entry.values, n=1)
    if key == KEY:
        fix = f"write {{{near[0]}}}" if near else "name fields that are there"
        fix += f" in {key}, or {{{{ and }}}} for braces, or correct the {entry.unit}"
    else:
        fix = f"set {key} to {near[0] if near else 'the field that holds it'}, or correct the {entry.unit}"
    raise ConfigError(
        f"this {entry.unit} has no field {field!r} ({key}); it has {', '.join(entry.values) or 'none'}.",
        fix=fix,
        where=entry.place,
    )


def _wrong_type(entry: Entry, field: str, value: Any, expected: str) -> ConfigError:
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return ConfigError(
        f"the field {field!r} is {shown}, not {expected}.",
        fix=f"correct or remove the {entry.unit}",
        where=entry.place,
    )
