"""Prompts that MindSpeed-RL's preprocess_data.py has tokenized: PREFIX_packed_COLUMN_document.bin with its .idx.

These are the files of Megatron's IndexedDataset: the tokens of all documents one after the other, and beside them an
index of their lengths and places. A prompt's chat template is written into its tokens already.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from qerl_rl.config.errors import ConfigError

TOKENS, ANSWERS = "input_ids", "labels"
"""The columns of prompts, and of the answers that rewards compare with."""
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
"""Version, code of the tokens' type, number of sequences, number of documents and one."""
_VERSION = 1
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def is_packed(prefix: str) -> bool:
    """Whether there are tokenized prompts of that prefix."""
    return bool(prefix) and _file(prefix, TOKENS, "idx").is_file()


def read_packed(prefix: str, column: str) -> list[np.ndarray]:
    """The tokens of each document of a column, [tokens] of the file's integer type.

    Raises: ConfigError when a file is missing, no index of tokens, or shorter than its index says.
    """
    index, data = _file(prefix, column, "idx"), _file(prefix, column, "bin")
    for file in (index, data):
        if not file.is_file():
            raise ConfigError(f"there is no {file}.", fix=f"preprocess the data again, with the column {column}")
    content = index.read_bytes()
    header = content[len(_MAGIC) : len(_MAGIC) + _HEADER.size]
    if not content.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise _broken(index, "is no index of tokens")
    version, code, sequences, _ = _HEADER.unpack(header)
    if version != _VERSION or code not in _TYPES:
        raise _broken(index, f"has version {version} and type {code} of tokens")
    kind, first = np.dtype(_TYPES[code]), len(_MAGIC) + _HEADER.size
    if len(content) < first + 12 * sequences:
        raise _broken(index, f"ends before its {sequences} sequences")
    lengths = np.frombuffer(content, "<i4", sequences, first)
    places = np.frombuffer(content, "<i8", sequences, first + 4 * sequences)
    tokens = np.fromfile(data, kind)
    if sequences and int(places[-1]) + int(lengths[-1]) * kind.itemsize > tokens.nbytes:
        raise _broken(data, "is shorter than its index says")
    starts = places // kind.itemsize
    return [tokens[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]


def _file(prefix: str, column: str, kind: str) -> Path:
    return Path(f"{prefix}_packed_{column}_document.{kind}")


def _broken(file: Path, problem: str) -> ConfigError:
    return ConfigError(f"{file} {problem}.", fix="preprocess the data again", where=str(file))
