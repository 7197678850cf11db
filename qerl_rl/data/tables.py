"""Reading Parquet, Arrow and CSV files and data sets of the Hugging Face hub, with the `datasets` library."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.data.lines import unreadable
from qerl_rl.data.records import Entry

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
"""The reader of `datasets` by the file's ending."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_LINES = (".jsonl", ".json")
FILE_ENDINGS = (*_LINES, *FORMATS)
"""The endings that make a path a file's, whether it is there or not."""


def is_table(path: str) -> bool:
    """Whether the file's ending is one of FORMATS."""
    return Path(path).suffix.lower() in FORMATS


def is_hub_name(path: str) -> bool:
    """Whether `path` reads `owner/name` and no file or folder is there."""
    return bool(_HUB_NAME.fullmatch(path)) and Path(path).suffix not in _LINES and not Path(path).exists()


def table_entries(path: str, *, key: str) -> Iterator[Entry]:
    """The rows of a Parquet, Arrow (file or stream) or CSV file, read piece by piece.

    Args: key: the configuration key of `path`, for errors.
    Raises: ConfigError when the file is missing or not what its ending says.
    """
    reader = FORMATS[Path(path).suffix.lower()]
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise unreadable(path, key, error) from error
    from datasets import load_dataset

    try:
        options = _all_text(path) if reader == "csv" else {}
        rows = load_dataset(reader, data_files=str(Path(path).resolve()), split="train", streaming=True, **options)
        yield from _numbered(rows, path)
    except Exception as error:
        raise ConfigError(
            f"{path} can't be read as {reader}: {_one_line(error)}.",
            fix=f"make it a {reader} file, or give it the ending of what it is",
            where=path,
        ) from error


def _all_text(path: str) -> dict[str, Any]:
    """Options that take each column of a CSV file as text: guessed types would make 1 and nothing of 01 and NA."""
    from datasets import Features, Value

    with open(path, encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file), [])
    return {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}


def hub_entries(name: str, *, subset: str, split: str, key: str, split_key: str) -> Iterator[Entry]:
    """The rows of a data set of the hub, downloaded once into the cache of `datasets` (HF_HOME), read from there later.

    Args: subset: its configuration; empty takes the default one. key, split_key: the configuration keys of `name` and
        `split`, for errors.
    Raises: ConfigError when there is no such data set, subset or split, or it is not in the cache and can't be reached.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, subset or None, split=split)
    except Exception as error:
        reason = _one_line(error)
        if isinstance(error, ConnectionError):
            fix = f"go online, or set {key} to a file on this machine"
        elif isinstance(error, FileNotFoundError):
            fix = f"correct the name in {key}, or set it to a file on this machine"
        else:
            fix = f"correct {key}, data.subset ({subset or 'empty'}) or {split_key} ({split})"
        raise ConfigError(f"{key}={name} can't be loaded from the hub: {reason}.", fix=fix) from error
    yield from _numbered(rows, name)


def _numbered(rows: Iterable[dict[str, Any]], source: str) -> Iterator[Entry]:
    for number, values in enumerate(rows, start=1):
        yield Entry(f"{source}, row {number}", values, "row")


def _one_line(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return " ".join(text.split())[:200].rstrip(".")
