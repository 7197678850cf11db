"""What the engine makes of the formats of a checkpoint: which weights its kernels take as they are stored.

Where a platform has no kernel of a format (quant/platforms.py), its weights are dequantized to bfloat16 while they are
loaded, and vLLM is shown a config.json that never knew of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader, read_config
from qerl_rl.quant.formats import Format, get_format
from qerl_rl.quant.int4 import W4A16Asymmetric
from qerl_rl.quant.platforms import CONVERT, DEQUANTIZED, support
from qerl_rl.quant.stored import format_of_group


class LoadPlan:
    """How the checkpoint in `folder` runs on `platform` (a column of quant/platforms.py).

    Raises: ConfigError where the platform runs a format in no way, or the checkpoint can't be read.
    """

    def __init__(self, folder: str | Path, platform: str) -> None:
        self.reader, self.platform = CheckpointReader(folder), platform
        config = read_config(Path(folder))
        self._described = config.get("quantization_config")
        self._where = str(Path(folder) / "config.json")
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
        """Whether the engine takes every weight as it is stored."""
        runs = [(format, self._as_run(format)) for format in self._formats.values()]
        return all(run is not None and run.name == format.name for format, run in runs)

    def stored_format(self, weight: str) -> Format | None:
        """The format that a weight comes in; None: floats."""
        return self.reader.format_of(weight)

    def engine_format(self, weight: str) -> Format | None:
        """The format that the engine computes with for a weight of the checkpoint; None: floats."""
        format = self.reader.format_of(weight)
        return None if format is None else self._as_run(format)

    def _as_run(self, format: Format) -> Format | None:
        if isinstance(format, W4A16Asymmetric):
            # Kernels that know zero points are few, and none of them can be merged into.
            return None
        if self.platform == "cpu" and format.name in ("w4a16", "w4a8"):
            # The same numbers in the layout of the int4 kernel, which computes with int8 activations either way and
            # knows no scales of whole rows.
            return get_format("w4a16", format.group_size) if format.group_size else None
        return None if support(format.name, self.platform).how == DEQUANTIZED else format

    def tensors(self, weight: str) -> dict[str, torch.Tensor]:
        """What the engine loads for a weight of the checkpoint, by full name; bfloat16 where it is dequantized."""
        stored, run = self.reader.format_of(weight), self.engine_format(weight)
        if stored is None:
            return {weight: self.reader.get(weight)}
        if run is None:
            return {weight: self.reader.weight(weight, torch.bfloat16)}
        parts = self.reader.parts(weight)
        return {weight + suffix: tensor for suffix, tensor in run.stored(self.converted(stored, run, parts)).items()}

    def parts(self, weight: str) -> dict[str, torch.Tensor]:
        """The parts, as in memory, of a weight that the engine computes with in a format."""
        stored, run = self.reader.format_of(weight), self.engine_format(weight)
        assert stored is not None
        assert run is not None
        return self.converted(stored, run, self.reader.parts(weight))

    @staticmethod
    def converted(stored: Format, run: Format, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parts of one format as those of another that has the same numbers."""
        if stored.name == run.name:
            return parts
        scales = {"_scale": parts["_scale"]}
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
        return described

    def _modules(self, targets: list[str], format: Format) -> list[str]:
        """What names the modules of a group: its targets, or each module where they name a class."""
        if "Linear" not in targets:
            return targets
        names = [name for name in self.names() if self.reader.is_quantized(name)]
        kind = (type(format), format.group_size)
        formats = {name: self.reader.format_of(name) for name in names}
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


def local_tensors(plan: LoadPlan, foreign: frozenset[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that an engine loads, but for the modules `foreign`, of which no byte is read."""
    for name in plan.names():
        if name.rpartition(".")[0] not in foreign:
            yield from plan.tensors(name).items()
