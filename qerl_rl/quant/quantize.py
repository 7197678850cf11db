"""Write the quantized twin of a HF checkpoint, shard by shard."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.base import quantization_config
from qerl_rl.quant.checkpoint import SHARD_BYTES, CheckpointReader, ShardWriter, read_config
from qerl_rl.quant.formats import Format, get_format

# Attention, dense MLPs, shared and routed experts (Mixtral calls those w1, w2, w3).
_QUANTIZED = re.compile(r"\.layers\.(\d+)\..*(_proj|\.experts\.\d+\.w[123])\.weight$")
_ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)(\.weight)?$")
_NEVER = ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*shared_expert_gate$"]
_EXPERTS_TARGET, _OTHERS_TARGET = r"re:.*\.experts\.\d+\..*", r"re:^(?!.*\.experts\.\d+\.).*_proj$"
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
    _formats: dict[bool, Format | None] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        of_experts = get_format(self.format, self.group_size)
        others = {"": of_experts, "none": None}.get(self.attention, of_experts)
        if self.attention not in ("", "none", self.format):
            others = get_format(self.attention)
        object.__setattr__(self, "_formats", {True: of_experts, False: others})

    def format_of(self, name: str) -> Format | None:
        """The format that the weight of this name gets; None when it stays as it is."""
        found = _QUANTIZED.search(name)
        if found is None or int(found[1]) in self.keep_layers:
            return None
        return self._formats[_ROUTED_EXPERT.search(name) is not None]

    def quantization_config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ignore = list(_NEVER)
        if self.keep_layers:
            ignore.append(rf"re:.*\.layers\.({'|'.join(map(str, sorted(self.keep_layers)))})\..*")
        of_experts, others = self._formats[True], self._formats[False]
        assert of_experts is not None
        if others is None:
            ignore.append(_OTHERS_TARGET)
        if others is None or others is of_experts:
            return of_experts.quantization_config(ignore)
        groups = {
            "group_0": of_experts.config_group([_EXPERTS_TARGET]),
            "group_1": others.config_group([_OTHERS_TARGET]),
        }
        return quantization_config(groups, ignore)


def quantize_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str = "w8a8",
    *,
    group_size: int = 0,
    attention: str = "",
    keep_layers: Collection[int] = (),
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write `source` with its Linear weights quantized to `out`; the rest, the tokenizer and the like are copied.

    Router, norms, embeddings and output layer are never quantized; `Recipe` says what the arguments choose.
    Tensors go through one at a time: memory holds one tensor and the unwritten part of one shard.
    Returns: bytes of tensors written.
    Raises: ConfigError for an unknown format or a folder that can't be read, is quantized already or has fused experts.
    """
    source, out = Path(source), Path(out)
    recipe = Recipe(format, attention, frozenset(keep_layers), group_size)
    if source.resolve() == out.resolve():
        raise ConfigError(f"{out} is the checkpoint to quantize itself.", fix="write to another folder")
    with CheckpointReader(source) as reader:
        config = read_config(source)
        _check_source(reader, config)
        writer = ShardWriter(out, shard_bytes)
        (out / "config.json").unlink(missing_ok=True)
        for name in reader:
            for suffix, tensor in _twin(reader, recipe, name).items():
                writer.add(name + suffix, tensor)
        writer.finish()
    _copy_other_files(source, out)
    config["quantization_config"] = recipe.quantization_config()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return writer.total_bytes


def _check_source(reader: CheckpointReader, config: dict[str, Any]) -> None:
    if "quantization_config" in config or any(reader.is_quantized(name) for name in reader):
        raise ConfigError(f"{reader.path} is quantized already.", fix="give the checkpoint in bfloat16 or float32")
    fused = next((name for name in reader if _FUSED_EXPERTS.search(name)), None)
    if fused:
        raise ConfigError(f"{reader.path} stores fused experts ({fused}).", fix="save one tensor for each expert")


def _twin(reader: CheckpointReader, recipe: Recipe, name: str) -> dict[str, torch.Tensor]:
    """What is stored for the tensor `name`, by suffix."""
    tensor, format = reader.get(name), recipe.format_of(name)
    if format is None:
        return {"": tensor}
    largest = None
    if any(part.per_matrix for part in format.parts):
        largest = torch.stack([reader.get(other).abs().amax().float() for other in _fused_with(reader, name)]).amax()
    try:
        return format.stored(format.quantize(tensor, largest))
    except ValueError as error:
        raise ConfigError(
            f"{name} can't be stored as {format.name}: {error}.",
            fix="choose another group size or format, or keep the layer",
            where=str(reader.path),
        ) from None


def _fused_with(reader: CheckpointReader, name: str) -> list[str]:
    """The names of the matrices that engines fuse with this one, itself among them."""
    stem, _, leaf = name.removesuffix(".weight").rpartition(".")
    together = next((fused for fused in _FUSED_IN_ENGINES if leaf in fused), (leaf,))
    return [other for other in (f"{stem}.{leaf}.weight" for leaf in together) if other in reader]


def _copy_other_files(source: Path, out: Path) -> None:
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(weights):
            shutil.copy2(file, out / file.name)
