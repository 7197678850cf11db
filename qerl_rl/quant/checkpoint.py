"""Read HF checkpoints one tensor at a time, and write them the same way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.fused_experts import Place, find_places
from qerl_rl.quant.formats import Format, Part
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.stored import StoredFormats

SHARD_BYTES = 2 << 30
INDEX_NAME = "model.safetensors.index.json"
_STORED_SUFFIXES = (
    *("", "_packed", "_scale", "_global_scale", "_shape", "_zero_point", "_offset"),
    *("_scale_second", "_offset_second"),
)
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class CheckpointReader:
    """The tensors of a HF folder by name, over one or many safetensors files; nothing is read before `get`.

    Fused experts go by the names of one tensor an expert, as what they are part of does not: see layout/fused_experts.
    Raises: ConfigError when the folder is missing, holds no safetensors, a file is broken or absent, or it is unclear
    how fused experts lie.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ConfigError(
                f"model folder {self.path} does not exist.", fix="give the path of a HF checkpoint folder"
            )
        self.bytes_read = 0
        """Of tensors, by `get` and what calls it."""
        self._open: dict[str, Any] = {}
        self._formats: StoredFormats | ModelSlimFormats | None = None
        self._file_of: dict[str, str] = {}
        for file_name in self._file_names():
            for name in self._handle(file_name).keys():  # noqa: SIM118 - safe_open is not a mapping
                self._file_of[name] = file_name
        self._places = self._find_places()

    def _find_places(self) -> dict[str, Place]:
        """Where the tensors lie that no file has under their name; those that they are found in leave `_file_of`."""
        places = find_places(self._file_of, self._header, lambda: read_config(self.path), str(self.path))
        if places:
            files = self._file_of
            lent = {place.tensor for place in places.values()}
            shown = {name: file for name, file in files.items() if name not in lent}
            # In the order in which a file of one tensor an expert has them.
            self._file_of = dict(sorted((shown | {name: files[at.tensor] for name, at in places.items()}).items()))
        return places

    def _header(self, stored: str) -> tuple[str, tuple[int, ...]]:
        header = self._handle(self._file_of[stored]).get_slice(stored)
        return header.get_dtype(), tuple(header.get_shape())

    @property
    def has_fused_experts(self) -> bool:
        """Whether some tensors are found in others, which programs that read the files themselves must know of."""
        return bool(self._places)

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

    def get(self, name: str, *index: slice) -> torch.Tensor:
        """The tensor as stored, or what `index` leaves of its dimensions: nothing else is read.

        Raises: KeyError when there is none of this name.
        """
        place = self._places.get(name)
        if place:
            tensor = place.read(self._stored(name), *index)
        else:
            tensor = self._stored(name)[index] if index else self._handle(self._file_of[name]).get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        place = self._places.get(name)
        if place and place.shape:
            return place.shape
        return tuple(self._stored(name).get_shape())

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors names it (F32, BF16, I8), without reading it."""
        return self._stored(name).get_dtype()

    def _stored(self, name: str) -> Any:
        """The stored tensor that `name` is or lies in, unread."""
        place = self._places.get(name)
        return self._handle(self._file_of[name]).get_slice(place.tensor if place else name)

    def is_quantized(self, name: str) -> bool:
        """Whether the weight `name` (X.weight) has scales beside it."""
        return f"{name}_scale" in self._file_of

    def format_of(self, name: str) -> Format | None:
        """The format of the weight `name` (X.weight, whatever its parts are called); None when it is a float tensor.

        Raises: ConfigError when config.json does not say how to read the parts that are there, or one is missing.
        """
        if not self.is_quantized(name):
            return None
        described = self._description()
        format = described.of_weight(name)
        stored = [described.stored_name(name, suffix) for suffix in (format.sources if format else ())]
        missing = [part for part in stored if part not in self._file_of]
        if format is None or missing:
            problem = f"is {format.name}, but has no {missing[0]}" if format else "has scales, but no format"
            raise ConfigError(
                f"{name} {problem}.",
                fix=f"use weights and {described.file_name} of the same checkpoint",
                where=str(self.path / described.file_name),
            )
        return format.with_scales(_FLOATS.get(self.dtype(f"{name}_scale"), torch.bfloat16))

    def _description(self) -> StoredFormats | ModelSlimFormats:
        """What the folder says of its formats. Raises: ConfigError for formats that have to be converted first."""
        if self._formats is None:
            if (self.path / ModelSlimFormats.file_name).exists():
                self._formats = ModelSlimFormats.read(self.path)
            else:
                self._formats = StoredFormats(read_config(self.path), str(self.path / "config.json"))
        return self._formats

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """The parts of a quantized weight X.weight [N, K] by suffix, as they are in memory (see `Part`)."""
        format = self.format_of(name)
        if format is None:
            raise KeyError(name)
        return format.loaded({suffix: self.get(self._stored_name(name, suffix)) for suffix in format.sources})

    def _stored_name(self, name: str, suffix: str) -> str:
        return self._description().stored_name(name, suffix)

    def part(self, name: str, part: Part, *index: slice) -> torch.Tensor:
        """One of the `parts` of X.weight, or what `index` leaves of its dimensions; nothing else is read where the part
        lies in the checkpoint as it does in memory, or its format knows where to look."""
        format = self.format_of(name)
        if format is None:
            raise KeyError(name)
        own, shape = format.stored_in(part), self.weight_shape(name)
        if own == (part.suffix,) and self.shape(self._stored_name(name, part.suffix)) == part.shape(shape):
            return self.get(self._stored_name(name, part.suffix), *index).to(part.dtype)
        read, wanted = format.window(part, shape[0], index)
        stored = {
            suffix: self.get(self._stored_name(name, suffix), *read)
            if suffix in own
            else torch.empty(self.shape(self._stored_name(name, suffix)), device="meta")
            for suffix in format.sources
        }
        return format.loaded(stored)[part.suffix][wanted]

    def weight(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `name` as floats, dequantized where it is quantized."""
        format = self.format_of(name)
        return self.get(name).to(dtype) if format is None else format.dequantize(self.parts(name), dtype)

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight `name`, whatever its parts are, without reading it; KeyError when there is none."""
        format = self.format_of(name)
        if format is None:
            return self.shape(name)
        return format.weight_shape(self.shape(self._stored_name(name, format.parts[0].suffix)))

    def weights(self) -> list[str]:
        """Names of all weights as an unquantized checkpoint would have them, sorted; parts are not among them."""
        quantized = {name.removesuffix("_scale") for name in self._file_of if name.endswith(".weight_scale")}
        parts = {name + suffix for name in quantized for suffix in _STORED_SUFFIXES}
        parts |= {f"{name.removesuffix('weight')}scale_bias" for name in quantized}
        return sorted((set(self._file_of) - parts) | quantized)

    def files(self) -> dict[str, list[str]]:
        """Names of the tensors of each file, in the order in which they lie in it, as near as its header tells."""
        found: dict[str, list[str]] = {}
        for name, file_name in self._file_of.items():
            found.setdefault(file_name, []).append(name)
        return found

    def release(self, file_name: str) -> None:
        """Give back the memory that the file's tensors took when they were read; it can be read again."""
        self._open.pop(file_name, None)

    def close(self) -> None:
        self._open.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_format(path: str | Path) -> str:
    """The quant.format of a HF folder: that of its experts, where formats are mixed; none where there is none.

    Raises: ConfigError, as `CheckpointReader` and `format_of`, and for other ways to quantize, such as AWQ's.
    """
    with CheckpointReader(path) as reader:
        if (reader.path / "config.json").exists():
            reader._description()
        quantized = [name.removesuffix("_scale") for name in reader if name.endswith(".weight_scale")]
        name = next((name for name in quantized if ".experts." in name), quantized[0] if quantized else None)
        format = reader.format_of(name) if name else None
        return format.name if format else "none"


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
