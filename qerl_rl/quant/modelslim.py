"""Checkpoints as msmodelslim describes them, which vLLM-Ascend reads with `quantization: ascend`.

A file beside the weights says for every tensor how it is stored (FLOAT where it is not quantized); config.json says
nothing. Which tensors there are and of which types follows vllm-ascend 0.23.0, `vllm_ascend/quantization/`:
modelslim_config.py (the file), methods/w8a8_dynamic.py, w8a8_mxfp8.py, w4a16_mxfp4.py (the tensors).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.formats import Format, get_format

TYPES = {"w8a8": "W8A8_DYNAMIC", "mxfp8": "W8A8_MXFP8", "mxfp4": "W4A16_MXFP4"}
"""quant.format -> msmodelslim's name of it."""
FLOAT = "FLOAT"
CACHE_KEY, CACHE_C8 = "kv_cache_type", "C8"
"""How a checkpoint says that it has scales of an int8 KV cache."""
_GROUP_SIZE = 32


class ModelSlimFormats:
    """The formats of a checkpoint's weights by its quant_model_description.json."""

    file_name = "quant_model_description.json"

    def __init__(self, described: dict[str, Any], where: str) -> None:
        self._described, self._where = described, where
        self._formats = {stored: get_format(name) for name, stored in TYPES.items()}

    @classmethod
    def read(cls, folder: Path) -> ModelSlimFormats:
        """Raises: ConfigError when the file is no JSON object."""
        path = folder / cls.file_name
        try:
            described = json.loads(path.read_text())
            if not isinstance(described, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise ConfigError(
                f"{cls.file_name} is broken: {error}.", fix="copy the checkpoint again", where=str(path)
            ) from None
        return cls(described, str(path))

    def of_weight(self, weight: str) -> Format | None:
        """The format of the weight X.weight; None where it is not quantized or not mentioned."""
        stored = self._described.get(weight, FLOAT)
        if stored == FLOAT:
            return None
        if stored not in self._formats:
            raise ConfigError(
                f"{weight} is stored as {stored}; {', '.join(self._formats)} can be read.",
                fix="quantize the bfloat16 checkpoint with `python -m qerl_rl quantize`",
                where=self._where,
            )
        return self._formats[stored]

    def suffix(self, part: str) -> str:
        """What a part is stored under, after X.weight: packed weights keep the name of the weight."""
        return "" if part == "_packed" else part


class Description:
    """Collects what quant_model_description.json says, while a checkpoint is written."""

    def __init__(self, format: Format) -> None:
        self._entries: dict[str, Any] = {"model_quant_type": _type_of(format)}
        if format.group_size:
            self._entries["group_size"] = _GROUP_SIZE

    def tensors(self, name: str, stored: dict[str, torch.Tensor], format: Format | None) -> dict[str, torch.Tensor]:
        """What msmodelslim's layout holds for the tensor `name`, by suffix; what it says of it is noted.

        Args: stored: what compressed-tensors' layout holds, by suffix.
        """
        renamed = stored if format is None else {"" if part == "_packed" else part: stored[part] for part in stored}
        if format is not None and format.name == "w8a8":
            # Zero: weights are symmetric. vLLM-Ascend has a parameter for it all the same.
            renamed = renamed | {"_offset": torch.zeros_like(stored["_scale"])}
        self._entries.update(dict.fromkeys((name + suffix for suffix in renamed), _type_of(format)))
        return renamed

    def write(self, folder: Path) -> None:
        (folder / ModelSlimFormats.file_name).write_text(json.dumps(self._entries, indent=1) + "\n")


def _type_of(format: Format | None) -> str:
    if format is None:
        return FLOAT
    if format.name not in TYPES:
        raise ConfigError(
            f"msmodelslim's layout of {format.name} is not one that can be written.",
            fix=f"choose {', '.join(TYPES)}, or leave --layout (vLLM-Ascend reads w4a16 and w4a8 so)",
        )
    return TYPES[format.name]
