"""Tells one model folder from another without reading all of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

PROBE_BYTES = 4096


def fingerprint(folder: str | Path) -> str:
    """Hex digest of the config, every tensor's name, shape and dtype, and the first 4 KiB of each tensor (of fused
    experts, of each of them).

    Equal for a copy of the folder at another path; another for other weights, as training or another seed gives them.
    Raises: OSError, ValueError for files that are no model's.
    """
    folder, digest = Path(folder), hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            _probe(file, digest)
    return digest.hexdigest()


def _probe(file: BinaryIO, digest: hashlib._Hash) -> None:
    # A safetensors file: the length of the header, the header as JSON, the tensors one after the other.
    length = int.from_bytes(file.read(8), "little")
    header = file.read(length)
    digest.update(header)
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            experts = entry["shape"][0] if len(entry["shape"]) == 3 else 1
            size = (end - begin) // max(experts, 1)
            for expert in range(experts):
                file.seek(8 + length + begin + expert * size)
                digest.update(file.read(min(size, PROBE_BYTES)))
