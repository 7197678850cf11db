"""Which format each weight of a checkpoint is stored in, from the `quantization_config` of its config.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.formats import FORMATS, WHOLE_ROW, Format, get_format
from qerl_rl.quant.int4 import W4A16Asymmetric


@dataclass(frozen=True)
class _Group:
    targets: tuple[str, ...]
    format: Format


class StoredFormats:
    """The formats of a checkpoint's weights by its `quantization_config` (that of compressed-tensors).

    Raises: ConfigError for a format that is none of quant.format's.
    """

    file_name = "config.json"

    def __init__(self, config: dict[str, Any], where: str) -> None:
        described = config.get("quantization_config") or {}
        method = described.get("quant_method", "compressed-tensors")
        if method != "compressed-tensors":
            raise ConfigError(
                f"the checkpoint is stored as {method!r}.",
                fix="convert it first: python -m qerl_rl quantize --model DIR --format w4a16 --out NEW_DIR",
                where=where,
            )
        self._ignore = tuple(described.get("ignore") or ())
        self._groups = [
            _Group(tuple(group["targets"]), format_of_group(group, where))
            for group in (described.get("config_groups") or {}).values()
        ]

    def of_weight(self, weight: str) -> Format | None:
        """The format of the weight X.weight; None where it is not quantized."""
        name = weight.removesuffix(".weight")
        if any(_matches(name, ignored) for ignored in self._ignore):
            return None
        # A target that names the module goes before one that names its class.
        for group in self._groups:
            if any(_matches(name, target) for target in group.targets):
                return group.format
        return next((group.format for group in self._groups if "Linear" in group.targets), None)

    def stored_name(self, weight: str, suffix: str) -> str:
        """What the tensor of this suffix is called of the weight X.weight."""
        return weight + suffix


def _matches(name: str, target: str) -> bool:
    """compressed-tensors' rule: `re:` begins a pattern that the name begins with."""
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def format_of_group(group: dict[str, Any], where: str) -> Format:
    weights, activations = group["weights"], group.get("input_activations")
    kind = (weights["type"], weights["num_bits"])
    size = weights.get("group_size") or WHOLE_ROW
    name = {
        ("int", 8): "w8a8" if activations else None,
        ("int", 4): "w4a8" if activations else "w4a16",
        ("float", 4): {16: "nvfp4", 32: "mxfp4"}.get(size),
        ("float", 8): "mxfp8" if size == 32 else None,
    }.get(kind)
    symmetric = weights.get("symmetric", True)
    if name == "w4a16" and not symmetric and weights.get("actorder") in (None, "weight", "static"):
        return W4A16Asymmetric(max(size, 0))
    if name is None or not symmetric or weights.get("strategy") not in ("channel", "group", "tensor_group"):
        raise ConfigError(
            f"weights of {kind[1]} bits ({kind[0]}, {'' if symmetric else 'a'}symmetric, {weights.get('strategy')} "
            f"scales, groups of {size}) are none of the formats {', '.join(FORMATS)}.",
            fix="quantize the bfloat16 checkpoint with `python -m qerl_rl quantize`",
            where=where,
        )
    return get_format(name, size)
