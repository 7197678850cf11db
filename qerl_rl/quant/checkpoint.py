"""Read HF checkpoints one tensor at a time, and write their quantized twins the same way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant import w8a8

FORMATS = ("w8a8",)
SHARD_BYTES = 2 << 30
INDEX_NAME = "model.safetensors.index.json"

# Attention, dense MLPs, shared and routed experts (Mixtral calls those w1, w2, w3).
_QUANTIZED = re.compile(r"\.layers\.\d+\..*(_proj|\.experts\.\d+\.w[123])\.weight$")
_FUSED_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)(\.weight)?$")
_IGNORE = ["lm_head", r"re:.*mlp\.gate$", r"re:.*block_sparse_moe\.gate$", r"re:.*shared_expert_gate$"]


class CheckpointReader:
    """The tensors of a HF folder by name, over one or many safetensors files; nothing is read before `get`.

    Raises: ConfigError when the folder is missing, holds no safetensors, or a file is broken or absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(
                f"model folder {self.path} does not exist.", fix="give the path of a HF checkpoint folder"
            )
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file_name in self._file_names():
            for name in self._handle(file_name).keys():  # noqa: SIM118 - safe_open is not a mapping
                self._file_of[name] = file_name

    def _file_names(self) -> list[str]:
        index = self.path / INDEX_NAME
        if not index.exists():
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
            if not names:
                raise ConfigError(
                    f"{self.path} holds no .safetensors file.", fix="save the checkpoint with safe_serialization"
                )
            return names
        try:
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise ConfigError(
                f"{INDEX_NAME} is broken: {error}.", fix="copy the checkpoint again", where=str(index)
            ) from None

    def _handle(self, file_name: str) -> Any:
        if file_name not in self._open:
            try:
                self._open[file_name] = safe_open(self.path / file_name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{file_name} can't be read: {error}.", fix="copy the checkpoint again", where=str(self.path)
                ) from None
        return self._open[file_name]

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> torch.Tensor:
        """The tensor as stored (dtype and shape); KeyError when there is none of this name."""
        return self._handle(self._file_of[name]).get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._handle(self._file_of[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors names it (F32, BF16, I8), without reading it."""
        return self._handle(self._file_of[name]).get_slice(name).get_dtype()

    def is_quantized(self, name: str) -> bool:
        """Whether the weight `name` (X.weight) is int8 with scales in X.weight_scale."""
        return f"{name}_scale" in self._file_of

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_format(path: str | Path) -> str:
    """The quant.format of a HF folder: w8a8, or none. Raises: ConfigError, as `CheckpointReader`."""
    with CheckpointReader(path) as reader:
        return "w8a8" if any(reader.is_quantized(name) for name in reader.names()) else "none"


class ShardWriter:
    """Writes named tensors into safetensors files of at most `shard_bytes` each (a larger tensor gets its own).

    `finish` names the files as HF does (and writes the index of several), so that a broken-off write leaves no folder
    that loads. Earlier model files in the folder are removed.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model*.safetensors"), *folder.glob("part-*.tmp"), folder / INDEX_NAME]:
            old.unlink(missing_ok=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._waiting, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._waiting))
        self.total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.tmp"

    def finish(self) -> None:
        if self._waiting:
            self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file_name = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(number).rename(self._folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1))


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; ConfigError when it is missing or no JSON."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        problem = f"{folder} has no config.json."
    except ValueError as error:
        problem = f"{folder / 'config.json'} is no JSON: {error}."
    raise ConfigError(problem, fix="give the path of a HF checkpoint folder")


def quantize_checkpoint(
    source: str | Path, out: str | Path, format: str = "w8a8", *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write `source` with its Linear weights quantized to `out`; the rest, the tokenizer and the like are copied.

    Tensors go through one at a time: memory holds one tensor and the unwritten part of one shard.
    Returns: bytes of tensors written.
    Raises: ConfigError for an unknown format or a folder that can't be read, is quantized already or has fused experts.
    """
    source, out = Path(source), Path(out)
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown.", fix=f"set quant.format to one of {', '.join(FORMATS)}")
    if source.resolve() == out.resolve():
        raise ConfigError(f"{out} is the checkpoint to quantize itself.", fix="write to another folder")
    with CheckpointReader(source) as reader:
        config = read_config(source)
        if "quantization_config" in config or any(reader.is_quantized(name) for name in reader):
            raise ConfigError(f"{source} is quantized already.", fix="give the checkpoint in bfloat16 or float32")
        fused = next((name for name in reader if _FUSED_EXPERTS.search(name)), None)
        if fused:
            raise ConfigError(f"{source} stores fused experts ({fused}).", fix="save one tensor for each expert")
        writer = ShardWriter(out, shard_bytes)
        (out / "config.json").unlink(missing_ok=True)
        for name in reader:
            tensor = reader.get(name)
            if _QUANTIZED.search(name):
                quantized, scale = w8a8.quantize(tensor)
                writer.add(name, quantized)
                writer.add(f"{name}_scale", scale)
            else:
                writer.add(name, tensor)
        writer.finish()
    _copy_other_files(source, out)
    config["quantization_config"] = w8a8.quantization_config(_IGNORE)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return writer.total_bytes


def _copy_other_files(source: Path, out: Path) -> None:
    weights = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf")
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(weights):
            shutil.copy2(file, out / file.name)
