"""What the engine makes of the formats of a checkpoint: which weights its kernels take as they are stored.

Where a platform has no kernel of a format (quant/platforms.py), its weights are dequantized to bfloat16 while they are
loaded, and vLLM is shown a config.json that never knew of it. A float checkpoint whose weights all train can be rounded
to a format while it is loaded, as `python -m qerl_rl quantize` would round it.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.base import quantization_config
from qerl_rl.quant.checkpoint import CheckpointReader, read_config
from qerl_rl.quant.formats import GROUP_SIZES, Format, Part, get_format
from qerl_rl.quant.int4 import W4A16Asymmetric
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.platforms import CONVERT, DEQUANTIZED, support
from qerl_rl.quant.quantize import NEVER, Recipe, Rounding
from qerl_rl.quant.stored import format_of_group

WHOLE = slice(None)
ASCEND = ("910", "a5")
"""Platforms whose engine reads msmodelslim's description itself."""


class LoadPlan:
    """How the checkpoint in `folder` runs on `platform` (a column of quant/platforms.py).

    quantize_to: what a float checkpoint is rounded to (a value of quant.format); none or empty leaves it.
    group_size: of that format, as `get_format` takes it.
    Raises: ConfigError where the platform runs a format in no way, the checkpoint can't be read, or it is quantized
    already where `quantize_to` names a format.
    """

    def __init__(self, folder: str | Path, platform: str, quantize_to: str | None = None, group_size: int = 0) -> None:
        self.reader, self.platform = CheckpointReader(folder), platform
        self._recipe = Recipe(quantize_to, group_size=group_size) if quantize_to not in (None, "", "none") else None
        self._where = str(Path(folder) / "config.json")
        self._described = read_config(Path(folder)).get("quantization_config")
        by_msmodelslim = (Path(folder) / ModelSlimFormats.file_name).exists()
        self._is_translated = by_msmodelslim and platform not in ASCEND
        if self._recipe is not None:
            if self._described or by_msmodelslim:
                raise ConfigError(
                    f"{folder} is quantized already, and can't be rounded to {quantize_to}.",
                    fix="set model.path to the checkpoint in bfloat16 or float32",
                    where=self._where,
                )
            self._described = self._recipe.quantization_config()
            self._rounding = Rounding(self.reader, self._recipe)
        if self._is_translated:
            self._formats, self._described = _in_compressed_tensors_words(self.reader)
        else:
            groups = (self._described or {}).get("config_groups") or {}
            self._formats = {name: format_of_group(group, self._where) for name, group in groups.items()}
        for format in self._formats.values():
            how = support(format.name, platform)
            if how.how == CONVERT:
                raise ConfigError(
                    f"the engine has no kernel of {format.name} on {platform}.",
                    fix=f"quantize the bfloat16 checkpoint to {' or '.join(how.formats)}",
                    where=self._where,
                )

    @property
    def is_native(self) -> bool:
        """Whether the engine takes every weight as it is stored, under the name that it has in its file."""
        if self._recipe is not None or self._is_translated or self.reader.has_fused_experts:
            return False
        runs = [(format, self._as_run(format)) for format in self._formats.values()]
        return all(run is not None and run.name == format.name for format, run in runs)

    @property
    def is_described(self) -> bool:
        """Whether the engine finds all that it needs to know of the formats in the checkpoint's own config.json."""
        return self.quantization_config() == self._described

    def stored_format(self, weight: str) -> Format | None:
        """The format that a weight is stored in, or rounded to; None: floats."""
        return self.reader.format_of(weight) if self._recipe is None else self._recipe.format_of(weight)

    def engine_format(self, weight: str) -> Format | None:
        """The format that the engine computes with for a weight of the checkpoint; None: floats."""
        format = self.stored_format(weight)
        return None if format is None else self._as_run(format)

    def _as_run(self, format: Format) -> Format | None:
        if isinstance(format, W4A16Asymmetric):
            # Kernels that know zero points are few, and none of them can be merged into.
            return None
        if self.platform == "cpu" and format.name in ("w4a16", "w4a8"):
            # The same numbers in the layout of the int4 kernel, which computes with int8 activations either way and
            # knows no scales of whole rows, nor groups that vLLM has no name for.
            return get_format("w4a16", format.group_size) if format.group_size in GROUP_SIZES["w4a16"] else None
        return None if support(format.name, self.platform).how == DEQUANTIZED else format

    def tensors(self, weight: str) -> dict[str, torch.Tensor]:
        """What the engine loads for a weight of the checkpoint, by full name; bfloat16 where it is dequantized."""
        stored, run = self.stored_format(weight), self.engine_format(weight)
        if stored is None:
            return {weight: self.reader.get(weight)}
        if run is None:
            return {weight: self.floats(weight)}
        return {weight + suffix: tensor for suffix, tensor in run.stored(self.parts(weight)).items()}

    def parts(self, weight: str, rows: slice = WHOLE, columns: slice = WHOLE) -> dict[str, torch.Tensor]:
        """The parts, as in memory, of a weight [N, K] that the engine computes with in a format; nothing else is read.

        columns: of the weight, in whole groups of those that share a scale.
        """
        stored, run = self.stored_format(weight), self.engine_format(weight)
        assert stored is not None
        assert run is not None
        return self.converted(stored, run, self._stored_parts(weight, stored, rows, columns))

    def floats(self, weight: str, rows: slice = WHOLE, columns: slice = WHOLE) -> torch.Tensor:
        """Rows and columns of a weight that the engine computes with as bfloat16; nothing else is read."""
        stored = self.stored_format(weight)
        if stored is None:
            return self.reader.get(weight, rows, columns).to(torch.bfloat16)
        start, stop, _ = columns.indices(self.reader.weight_shape(weight)[1])
        # In whole groups: where nothing but floats is left of them, a rank's columns may begin within one.
        unit = math.lcm(*(part.columns for part in stored.parts if part.columns))
        first = start // unit * unit
        parts = self._stored_parts(weight, stored, rows, slice(first, -(-stop // unit) * unit))
        return stored.dequantize(parts, torch.bfloat16)[:, start - first : stop - first]

    def _stored_parts(self, weight: str, format: Format, rows: slice, columns: slice) -> dict[str, torch.Tensor]:
        start, stop, _ = columns.indices(self.reader.weight_shape(weight)[1])

        def index(part: Part) -> tuple[slice, slice]:
            return rows, slice(start // part.columns, stop // part.columns) if part.columns else WHOLE

        if self._recipe is None:
            return {part.suffix: self.reader.part(weight, part, *index(part)) for part in format.parts}
        with _floats_are_float32():
            rounded = self._rounding.parts(weight, self.reader.get(weight))
        return {part.suffix: rounded[part.suffix][index(part)] for part in format.parts}

    @staticmethod
    def converted(stored: Format, run: Format, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parts of one format as those of another that has the same numbers."""
        if stored.name == run.name:
            return parts
        # The kernel's own type; msmodelslim's are float32.
        scales = {"_scale": parts["_scale"].to(run.parts[-1].dtype)}
        ones = {"_scale": torch.ones_like(parts["_scale"])}
        return run.encode(parts[""], ones) | scales

    def names(self) -> list[str]:
        """All weights of the checkpoint, as an unquantized one would name them."""
        return self.reader.weights()

    def quantization_config(self) -> dict[str, Any] | None:
        """The `quantization_config` that the engine is to know of."""
        runs = {name: self._as_run(format) for name, format in self._formats.items()}
        if not any(runs.values()):
            return None if self._formats else self._described
        described = copy.deepcopy(self._described)
        assert described is not None
        for name, run in runs.items():
            group = described["config_groups"][name]
            if run is None:
                del described["config_groups"][name]
                described["ignore"] = [*described["ignore"], *self._modules(group["targets"], self._formats[name])]
            elif run.name != self._formats[name].name:
                described["config_groups"][name] = run.config_group(group["targets"])
                described["format"] = described["config_groups"][name]["format"]
        return described | self._ascend_group_size()

    def _ascend_group_size(self) -> dict[str, int]:
        """vllm-ascend's W4A16 reads the group size beside the groups of modules, and takes 32 where it finds none."""
        if self.platform not in ASCEND:
            return {}
        sizes = [format.group_size for format in self._formats.values() if format.name == "w4a16"]
        return {"group_size": sizes[0]} if sizes else {}

    def _modules(self, targets: list[str], format: Format) -> list[str]:
        """What names the modules of a group: its targets, or each module where they name a class."""
        if "Linear" not in targets:
            return targets
        kind = (type(format), format.group_size)
        formats = {name: self.stored_format(name) for name in self.names()}
        return [
            name.removesuffix(".weight")
            for name, found in formats.items()
            if found is not None and (type(found), found.group_size) == kind
        ]

    def line(self) -> str:
        """What a run says of it."""
        if not self._formats:
            return "the engine computes with the weights as they are stored, unquantized"
        return "; ".join(dict.fromkeys(self._said(format) for format in self._formats.values()))

    def _said(self, format: Format) -> str:
        how, run = support(format.name, self.platform), self._as_run(format)
        groups = f" (groups of {format.group_size})" if format.group_size else ""
        if run is None:
            zeros = " with zero points" if isinstance(format, W4A16Asymmetric) else ""
            return f"{format.name}{zeros}{groups}: dequantized to bfloat16 at load, {self.platform} has no kernel of it"
        if run.name != format.name:
            return f"{format.name}{groups}: native, in the layout of {run.name}"
        return f"{format.name}{groups}: native{', ' + how.note if how.note else ''}"


def _in_compressed_tensors_words(reader: CheckpointReader) -> tuple[dict[str, Format], dict[str, Any]]:
    """The formats of a checkpoint that msmodelslim describes by name of their group, and the `quantization_config` that
    says the same: each module is named, in a group or as an exception."""
    modules: dict[str, list[str]] = {}
    formats: dict[str, Format] = {}
    # A router's or an output layer's module may have no tensor of its own.
    ignored = list(NEVER)
    for weight in reader.weights():
        format, module = reader.format_of(weight), weight.removesuffix(".weight")
        if format is None:
            ignored.append(module)
        else:
            formats.setdefault(format.name, format)
            modules.setdefault(format.name, []).append(module)
    groups = {name: format.config_group(modules[name]) for name, format in formats.items()}
    return formats, quantization_config(groups, ignored)


@contextlib.contextmanager
def _floats_are_float32() -> Iterator[None]:
    """vLLM makes the type of its model torch's default while it loads; scales are computed in float32."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def local_tensors(plan: LoadPlan, foreign: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that an engine loads, but for the modules `foreign`, of which no byte is read."""
    for name in plan.names():
        if name.rpartition(".")[0] not in foreign:
            yield from plan.tensors(name).items()
