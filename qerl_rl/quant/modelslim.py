"""Checkpoints as msmodelslim describes them, which vLLM-Ascend reads with `quantization: ascend`.

A file beside the weights says for every tensor how it is stored (FLOAT where it is not quantized); config.json says
nothing. Which tensors there are and of which types follows vllm-ascend 0.23.0, `vllm_ascend/quantization/`:
modelslim_config.py (the file), methods/w8a8_dynamic.py, w8a8_mxfp8.py, w4a16_mxfp4.py, w4a16.py (the tensors);
`modelslim_w4a8` has W4A8_DYNAMIC's. W4A16 is packed there as compressed-tensors does it; msmodelslim's own packing of
it has no reader in vllm-ascend.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.formats import Format, get_format
from qerl_rl.quant.int4 import W4A16, W4A16Asymmetric
from qerl_rl.quant.modelslim_w4a8 import DEFAULT_GROUP_SIZE, VERSION, W4A8Dynamic, scale_bias

TYPES = {
    "w8a8": "W8A8_DYNAMIC",
    "w4a16": "W4A16",
    "w4a8": "W4A8_DYNAMIC",
    "mxfp8": "W8A8_MXFP8",
    "mxfp4": "W4A16_MXFP4",
}
"""quant.format -> msmodelslim's name of it."""
FLOAT = "FLOAT"
CACHE_KEY, CACHE_C8 = "kv_cache_type", "C8"
"""How a checkpoint says that it has scales of an int8 KV cache."""
_GROUP_KEY, _VERSION_KEY = "group_size", "version"
_W4A16_GROUP_SIZE = 32
"""Of a description that names none, as in vllm-ascend."""


class ModelSlimFormats:
    """The formats of a checkpoint's weights by its quant_model_description.json."""

    file_name = "quant_model_description.json"

    def __init__(self, described: dict[str, Any], where: str) -> None:
        self._described, self._where = described, where
        size, in_pairs = described.get(_GROUP_KEY), described.get(_VERSION_KEY) == VERSION
        self._formats = {stored: get_format(name) for name, stored in TYPES.items()}
        self._formats[TYPES["w4a8"]] = W4A8Dynamic(DEFAULT_GROUP_SIZE if size is None else int(size), in_pairs)
        self._formats[TYPES["w4a16"]] = W4A16(_W4A16_GROUP_SIZE if size is None else int(size))

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
        stored = self._described.get(weight, self._described.get(f"{weight}_packed", FLOAT))
        if stored == FLOAT:
            return None
        if stored not in self._formats:
            raise ConfigError(
                f"{weight} is stored as {stored}; {', '.join(self._formats)} can be read.",
                fix="quantize the bfloat16 checkpoint with `python -m qerl_rl quantize`",
                where=self._where,
            )
        return self._formats[stored]

    def stored_name(self, weight: str, suffix: str) -> str:
        """What the tensor of this suffix is called of the weight X.weight: FP4 keeps the name of the weight."""
        is_plain = suffix == "_packed" and self._described.get(weight) == TYPES["mxfp4"]
        return weight if is_plain else weight + suffix


class Description:
    """Collects what quant_model_description.json says, while a checkpoint is written.

    Args: of_experts: the format of the routed experts. of_others: of what else is quantized, or None.
    Raises: ConfigError for what the layout can't hold, before anything is written.
    """

    def __init__(self, of_experts: Format, of_others: Format | None) -> None:
        formats = [of_experts, *([of_others] if of_others else [])]
        self._entries: dict[str, Any] = {"model_quant_type": _type_of(of_experts), _VERSION_KEY: VERSION}
        # What the schemes ask for one number: 0 means rows to W4A8 alone.
        sizes = {format.group_size for format in formats if format.name != "w8a8"}
        if len(sizes) > 1:
            raise ConfigError(
                f"msmodelslim's description has one group size, not {' and '.join(map(str, sorted(sizes)))}.",
                fix="choose equal groups (--group-size), or --attention w8a8 or none",
            )
        _refuse_unread(of_experts, of_others)
        if sizes:
            self._entries[_GROUP_KEY] = sizes.pop()

    def tensors(self, name: str, stored: dict[str, torch.Tensor], format: Format | None) -> dict[str, torch.Tensor]:
        """What msmodelslim's layout holds for the tensor `name`, by full name; what it says of it is noted.

        Args: stored: what compressed-tensors' layout holds, by suffix.
        Raises: ConfigError when the tensor has no place in it.
        """
        kind = _type_of(format)
        try:
            found = _in_layout(name, stored, format)
        except ValueError as error:
            raise ConfigError(
                f"{name} can't be stored as {kind}: {error}.", fix="keep the layer (--keep-layers), or leave --layout"
            ) from None
        self._entries.update(dict.fromkeys(found, kind))
        return found

    def write(self, folder: Path) -> None:
        (folder / ModelSlimFormats.file_name).write_text(json.dumps(self._entries, indent=1) + "\n")


def _in_layout(name: str, stored: dict[str, torch.Tensor], format: Format | None) -> dict[str, torch.Tensor]:
    """Raises: ValueError."""
    if format is None or format.name == "w4a16":
        return {name + suffix: tensor for suffix, tensor in stored.items()}
    if format.name == "w4a8":
        if format.group_size and not stored["_scale"].half().isfinite().all():
            raise ValueError("vllm-ascend has float16 scales for groups, and one is above 65504")
        tensors = W4A8Dynamic(format.group_size).stored(stored)
        bias = {f"{name.removesuffix('weight')}scale_bias": scale_bias(name, stored)}
        return {name + suffix: tensor for suffix, tensor in tensors.items()} | bias
    found = {name + ("" if suffix == "_packed" else suffix): tensor for suffix, tensor in stored.items()}
    if format.name == "w8a8":
        # Zero: weights are symmetric. vLLM-Ascend has a parameter for it all the same.
        found[f"{name}_offset"] = torch.zeros_like(stored["_scale"])
    return found


def _refuse_unread(of_experts: Format, of_others: Format | None) -> None:
    """Raise ConfigError for int4 that vllm-ascend has no method of."""
    problem, fix = "", "leave out --group-size -1"
    if of_experts.name == "w4a16" and not of_experts.group_size:
        problem = "w4a16 in groups only from msmodelslim's layout"
    elif of_others is not None and of_others.name == "w4a16":
        problem, fix = "w4a16 in routed experts only", "add --attention w8a8 or none"
    elif of_others is not None and of_others.name == "w4a8" and not of_others.group_size:
        problem = "w4a8 outside routed experts in groups only from msmodelslim's layout"
        fix += ", or add --attention w8a8 or none"
    if problem:
        raise ConfigError(f"vllm-ascend reads {problem}.", fix=fix)


def _type_of(format: Format | None) -> str:
    if format is None:
        return FLOAT
    if format.name not in TYPES or isinstance(format, W4A16Asymmetric):
        zeros = " with zero points" if isinstance(format, W4A16Asymmetric) else ""
        raise ConfigError(
            f"msmodelslim's layout of {format.name}{zeros} is not one that vllm-ascend reads.",
            fix=f"choose {', '.join(TYPES)}, or leave --layout",
        )
    return TYPES[format.name]
