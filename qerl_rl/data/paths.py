"""From the path of a data set to its records, whatever is behind that path."""

from __future__ import annotations

from collections.abc import Iterable

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import DataConfig
from qerl_rl.data.arithmetic import arithmetic_problems, with_wrong_digits
from qerl_rl.data.functions import function_entries, is_function_name
from qerl_rl.data.lines import line_entries
from qerl_rl.data.records import Entry, Record, to_records
from qerl_rl.data.tables import hub_entries, is_hub_name, is_table, table_entries

ARITHMETIC = "arithmetic"
"""The data path that generates sums instead of reading a file."""


def read_records(
    data: DataConfig, *, seed: int, count_needed: int, eval_path: str = "", eval_split: str = "", pairs: bool = False
) -> list[Record]:
    """The records of `data.train_path`, or of `eval_path` where that is not empty; at least one.

    Args: seed, count_needed: of generated problems and how many of them (data.limit overrides it). eval_split: read
        instead of data.split, with eval_path. pairs: of a chosen and a rejected response, as `to_records` takes it.
    Raises: ConfigError when it can't be read, has no lines, or one of them can't be used.
    """
    path, key = (eval_path, "eval.path") if eval_path else (data.train_path, "data.train_path")
    split, split_key = (eval_split, "eval.split") if eval_path else (data.split, "data.split")
    if path == ARITHMETIC:
        entries: Iterable[Entry] = _sums(data.limit or count_needed, seed)
    elif is_table(path):
        entries = table_entries(path, key=key)
    elif is_hub_name(path):
        entries = hub_entries(path, subset=data.subset, split=split, key=key, split_key=split_key)
    elif is_function_name(path):
        entries = function_entries(path, data, split, key=key)
    else:
        entries = line_entries(path, key=key)
    records = to_records(entries, data, pairs=pairs)
    if not records:
        raise ConfigError(f"{path} has no lines.", fix=f"set {key} to data with at least one line or row", where=path)
    return records


def _sums(count: int, seed: int) -> list[Entry]:
    """Sums with their answers, which are also the chosen responses; the rejected ones have a wrong digit."""
    problems = arithmetic_problems(count, seed)
    wrong = with_wrong_digits(problems, 1.0, seed)
    return [
        Entry(ARITHMETIC, {"prompt": prompt, "answer": answer, "chosen": answer, "rejected": other}, "problem")
        for (prompt, answer), (_, other) in zip(problems, wrong, strict=True)
    ]
