"""Write the quantized twin of a HF checkpoint, shard by shard."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import QuantConfig
from qerl_rl.quant.base import quantization_config
from qerl_rl.quant.checkpoint import SHARD_BYTES, CheckpointReader, ShardWriter, read_config
from qerl_rl.quant.formats import Format, get_format
from qerl_rl.quant.int4_checkpoints import INT4_METHODS, Int4Conversion
from qerl_rl.quant.modelslim import Description, ModelSlimFormats

# Attention, dense MLPs, shared and routed experts (Mixtral calls those w1, w2, w3).
_QUANTIZED = re.compile(r"\.layers\.(\d+)\..*(_proj(_with_mqa)?|\.experts\.\d+\.w[123])\.weight$")
_ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")
NEVER = ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*shared_expert_gate$"]
"""Modules that are never quantized, as `quantization_config` names exceptions."""
_EXPERTS_TARGET, _OTHERS_TARGET = r"re:.*\.experts\.\d+\..*", r"re:^(?!.*\.experts\.\d+\.).*_proj(_with_mqa)?$"
_FUSED_IN_ENGINES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


@dataclass(frozen=True)
class Recipe:
    """What becomes of each weight of a checkpoint.

    format: of the routed experts. attention: of attention, dense MLPs and shared experts; "" takes `format`, "none"
    leaves them as they are. keep_layers: layers, counted from 0, of which nothing is quantized. group_size: that of
    `format`, as `get_format` takes it.
    """

    format: str
    attention: str = ""
    keep_layers: frozenset[int] = frozenset()
    group_size: int = 0
    of_experts: Format = field(init=False, repr=False, compare=False)
    """The format of the routed experts."""
    of_others: Format | None = field(init=False, repr=False, compare=False)
    """That of everything else that is quantized."""

    def __post_init__(self) -> None:
        of_experts = get_format(self.format, self.group_size)
        others = {"": of_experts, "none": None}.get(self.attention, of_experts)
        if self.attention not in ("", "none", self.format):
            others = get_format(self.attention)
        object.__setattr__(self, "of_experts", of_experts)
        object.__setattr__(self, "of_others", others)

    def only_format(self) -> Format:
        """The format of all; for what can't be chosen for each weight. Raises: ConfigError where that is asked for."""
        if self.attention or self.keep_layers or self.group_size:
            raise ConfigError(
                "a checkpoint that is quantized already is converted as it is.",
                fix="leave out --attention, --keep-* and --group-size",
            )
        return self.of_experts

    def format_of(self, name: str) -> Format | None:
        """The format that the weight of this name gets; None when it stays as it is."""
        found = _QUANTIZED.search(name)
        if found is None or int(found[1]) in self.keep_layers:
            return None
        return self.of_experts if _ROUTED_EXPERT.search(name) else self.of_others

    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ignore = list(NEVER)
        if self.keep_layers:
            ignore.append(rf"re:.*\.layers\.({'|'.join(map(str, sorted(self.keep_layers)))})\..*")
        of_experts, others = self.of_experts, self.of_others
        if others is None:
            ignore.append(_OTHERS_TARGET)
        if others is None or others is of_experts:
            return of_experts.quantization_config(ignore)
        groups = {
            "group_0": of_experts.config_group([_EXPERTS_TARGET]),
            "group_1": others.config_group([_OTHERS_TARGET]),
        }
        return quantization_config(groups, ignore)


def recipe_of(quant: QuantConfig) -> Recipe | None:
    """How weights are rounded that were trained as floats; None where the engine computes with floats.

    Raises: ConfigError for a format that has no groups of quant.group_size.
    """
    return None if quant.format == "none" else Recipe(quant.format, group_size=quant.group_size)


@dataclass
class Written:
    """What a quantized checkpoint came to. error: squares of differences to the source over squares, of what is
    quantized, as a root; None where weights were converted, or (AWQ) scaled besides."""

    weight_bytes: int = 0
    source_bytes: int = 0
    quantized: int = 0
    error: float | None = None


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str = "w8a8",
    *,
    group_size: int = 0,
    attention: str = "",
    keep_layers: Collection[int] = (),
    layout: str = "compressed-tensors",
    shard_bytes: int = SHARD_BYTES,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `source` with its Linear weights quantized to `out`; the rest, the tokenizer and the like are copied.

    Router, norms, embeddings and output layer are never quantized; `Recipe` says what the arguments choose. An AWQ or
    GPTQ checkpoint is converted, exactly, to w4a16. Fused experts are written one by one, as engines read them. Files
    of the source are read one after the other: memory holds the pages of one of them, what one matrix becomes, and the
    unwritten part of one shard.

    Args: layout: compressed-tensors, or msmodelslim (see `modelslim`). shard_bytes: of a file written. report: called
        with bytes of the source done, and all.
    Raises: ConfigError for an unknown format, one that the layout does not hold, or a folder that can't be read or is
    quantized already.
    """
    source, out = Path(source), Path(out)
    recipe = Recipe(format, attention, frozenset(keep_layers), group_size)
    if source.resolve() == out.resolve():
        raise ConfigError(f"{out} is the checkpoint to quantize itself.", fix="write to another folder")
    with CheckpointReader(source) as reader:
        config = read_config(source)
        described = config.pop("quantization_config", None)
        tensors = _tensors_of(reader, described, recipe)
        description = _description(tensors, recipe) if layout == "msmodelslim" else None
        writer = ShardWriter(out, shard_bytes)
        for stale in ("config.json", ModelSlimFormats.file_name):
            (out / stale).unlink(missing_ok=True)
        written = Written(source_bytes=sum(file.stat().st_size for file in source.glob("*.safetensors")))
        done = 0
        for file_name, names in reader.files().items():
            for name in names:
                format_of_it, stored = tensors.stored(name)
                written.quantized += format_of_it is not None
                target = tensors.target(name)
                if description:
                    named = description.tensors(target, stored, format_of_it)
                else:
                    named = {target + suffix: tensor for suffix, tensor in stored.items()}
                for stored_name, tensor in named.items():
                    writer.add(stored_name, tensor)
            reader.release(file_name)
            done += (source / file_name).stat().st_size
            report(done, written.source_bytes)
        writer.finish()
    _copy_other_files(source, out)
    if description:
        description.write(out)
    else:
        config["quantization_config"] = tensors.quantization_config()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    written.weight_bytes, written.error = writer.total_bytes, tensors.error()
    return written


def _tensors_of(
    reader: CheckpointReader, described: dict[str, Any] | None, recipe: Recipe
) -> Rounding | Int4Conversion:
    """What gives the new checkpoint's tensors. Args: described: the source's `quantization_config`."""
    if described and described.get("quant_method") in INT4_METHODS:
        return Int4Conversion(reader, described, recipe.only_format())
    if described or any(reader.is_quantized(name) for name in reader):
        raise ConfigError(f"{reader.path} is quantized already.", fix="give the checkpoint in bfloat16 or float32")
    return Rounding(reader, recipe)


def _description(tensors: Rounding | Int4Conversion, recipe: Recipe) -> Description:
    if isinstance(tensors, Int4Conversion):
        raise ConfigError("AWQ and GPTQ are converted to compressed-tensors' layout only.", fix="leave out --layout")
    return Description(recipe.of_experts, recipe.of_others)


class Rounding:
    """The tensors of a float checkpoint, rounded to nearest as the recipe says."""

    def __init__(self, reader: CheckpointReader, recipe: Recipe) -> None:
        self._reader, self._recipe = reader, recipe
        self._largest: dict[tuple[str, ...], torch.Tensor] = {}
        self._lost = self._whole = 0.0

    def target(self, name: str) -> str:
        """What the tensor `name` is called in the new checkpoint, before its suffixes."""
        return name

    def stored(self, name: str) -> tuple[Format | None, dict[str, torch.Tensor]]:
        """The format of the tensor `name`, and what is stored for it, by suffix."""
        tensor, format = self._reader.get(name), self._recipe.format_of(name)
        if format is None:
            return None, {"": tensor}
        parts = self.parts(name, tensor)
        exact = tensor.float()
        self._whole += exact.square().sum().item()
        self._lost += format.dequantize(parts).sub_(exact).square_().sum().item()
        return format, format.stored(parts)

    def parts(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts, as in memory, of the weight `name` that the recipe has a format for. Args: tensor: what it is."""
        format = self._recipe.format_of(name)
        assert format is not None
        largest = self._largest_of_fused(name) if any(part.per_matrix for part in format.parts) else None
        try:
            return format.quantize(tensor, largest)
        except ValueError as error:
            raise ConfigError(
                f"{name} can't be stored as {format.name}: {error}.",
                fix="choose another group size (--group-size) or format, or keep the layer (--keep-layers)",
                where=str(self._reader.path),
            ) from None

    def _largest_of_fused(self, name: str) -> torch.Tensor:
        """The largest |weight| of the matrices that engines fuse with this one, itself among them."""
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        together = next((fused for fused in _FUSED_IN_ENGINES if leaf in fused), (leaf,))
        names = tuple(other for other in (f"{stem}.{leaf}.weight" for leaf in together) if other in self._reader)
        if names not in self._largest:
            self._largest[names] = torch.stack([self._reader.get(each).abs().amax().float() for each in names]).amax()
        return self._largest[names]

    def quantization_config(self) -> dict[str, Any]:
        return self._recipe.quantization_config()

    def error(self) -> float:
        """Root of the squares of what rounding changed over the squares of what was there."""
        return math.sqrt(self._lost / self._whole) if self._whole else 0.0


def _copy_other_files(source: Path, out: Path) -> None:
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(weights):
            shutil.copy2(file, out / file.name)
