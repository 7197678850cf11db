"""AWQ and GPTQ checkpoints (int4), converted exactly: the same integers, zero points and scales in W4A16's layout.

AWQ is AutoAWQ's `gemm` packing, which compressed-tensors converts. GPTQ is that of AutoGPTQ and GPTQModel: a weight is
scale * (q - zero); qweight [K / 8, N] packs eight rows of [K, N] into an int32, the first in the lowest bits; qzeros
[groups, N / 8] packs columns alike, and in its first version holds each zero point minus one.
"""

from __future__ import annotations

from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.formats import Format
from qerl_rl.quant.int4 import W4A16, W4A16Asymmetric
from qerl_rl.quant.nibbles import pack_nibbles

INT4_METHODS = ("awq", "gptq")
_PACKED = (".qweight", ".qzeros", ".scales", ".g_idx")


class Int4Conversion:
    """The tensors of an AWQ or GPTQ checkpoint in compressed-tensors' layout.

    Args: described: its `quantization_config`. wanted: the format asked for, which must be w4a16.
    Raises: ConfigError for what W4A16 can't hold: other than 4 bits, columns in the order of their activations.
    """

    def __init__(self, reader: CheckpointReader, described: dict[str, Any], wanted: Format) -> None:
        self._reader, self._described = reader, described
        self._method = described["quant_method"]
        where = str(reader.path / "config.json")
        if wanted.name != "w4a16":
            raise ConfigError(f"{reader.path} holds {self._method} int4.", fix="use --format w4a16", where=where)
        bits, version = described.get("bits", 4), str(described.get("version", "gemm")).lower()
        if bits != 4 or (self._method == "awq" and version != "gemm"):
            raise ConfigError(
                f"{reader.path} holds {self._method} with {bits} bits ({version}); int4 (AWQ: gemm) can be converted.",
                fix="quantize the bfloat16 checkpoint",
                where=where,
            )
        key = "zero_point" if self._method == "awq" else "sym"
        asymmetric = described.get(key, True) == (self._method == "awq")
        size = described.get("group_size", 128)
        self._format: W4A16 = (W4A16Asymmetric if asymmetric else W4A16)(max(size, 0), torch.float16)

    def target(self, name: str) -> str:
        """What the tensor `name` is called in the new checkpoint, before its suffixes."""
        return f"{name.removesuffix('.qweight')}.weight" if name.endswith(".qweight") else name

    def stored(self, name: str) -> tuple[Format | None, dict[str, torch.Tensor]]:
        """The format of the tensor `name`, and what is stored for it, by suffix; nothing for what goes with another."""
        module, dot, kind = name.rpartition(".")
        if dot + kind not in _PACKED:
            return None, {"": self._reader.get(name)}
        if kind != "qweight":
            return None, {}
        tensors = {suffix: self._reader.get(module + suffix) for suffix in _PACKED if module + suffix in self._reader}
        if self._method == "awq":
            values, zeros, scale = _unpack_awq(tensors)
        else:
            self._check_order(name, tensors.get(".g_idx"))
            values, zeros, scale = _unpack_gptq(tensors, self._described.get("checkpoint_format") == "gptq_v2")
        self._check_zeros(name, zeros)
        format = self._format.with_scales(scale.dtype)
        parts = {"_packed": pack_nibbles((values + 8).view(torch.uint8)).view(torch.int32), "_scale": scale}
        if isinstance(self._format, W4A16Asymmetric):
            parts["_zero_point"] = torch.zeros_like(scale, dtype=torch.int8) if zeros is None else zeros
        return format, format.stored(parts)

    def _check_zeros(self, name: str, zeros: torch.Tensor | None) -> None:
        where = str(self._reader.path / "config.json")
        if zeros is not None and zeros.any() and not isinstance(self._format, W4A16Asymmetric):
            raise ConfigError(
                f"{name} has zero points besides 8, but is described as symmetric.",
                fix="correct `sym` or `zero_point` in quantization_config",
                where=where,
            )
        if zeros is not None and (zeros > 7).any():
            raise ConfigError(
                f"{name} has a zero point of 16, which four bits don't hold.",
                fix="say `checkpoint_format: gptq_v2` in quantization_config if its zero points are not less one",
                where=where,
            )

    def _check_order(self, name: str, order: torch.Tensor | None) -> None:
        """Groups must be of columns that lie side by side."""
        if order is None:
            return
        columns = torch.arange(len(order), dtype=order.dtype)
        if not torch.equal(order, columns // (self._format.group_size or len(order))):
            raise ConfigError(
                f"{name} has its columns in the order of their activations (desc_act), which no engine's experts read.",
                fix="use a GPTQ checkpoint that was made with desc_act: false, or quantize the bfloat16 checkpoint",
                where=str(self._reader.path),
            )

    def quantization_config(self) -> dict[str, Any]:
        """That of the converted checkpoint: every Linear module that was not packed is ignored."""
        quantized = {name.removesuffix(".qweight") for name in self._reader if name.endswith(".qweight")}
        linear = [
            name.removesuffix(".weight")
            for name in self._reader
            if name.endswith(".weight") and len(self._reader.shape(name)) == 2
        ]
        return self._format.quantization_config([name for name in linear if name not in quantized])

    def error(self) -> None:
        """Nothing is rounded."""


Unpacked = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]
"""int8 values and zero points less 8, and scales: [N, K], [N, groups], [N, groups]."""


def _unpack_awq(tensors: dict[str, torch.Tensor]) -> Unpacked:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    values, zeros = AutoAWQConverter.unpack_awq(tensors[".qweight"], tensors.get(".qzeros"), 4)
    values, zeros = AutoAWQConverter.reverse_awq_order(values, zeros, 4)
    centred = ((values & 15) - 8).to(torch.int8).T.contiguous()
    return (
        centred,
        None if zeros is None else ((zeros & 15) - 8).to(torch.int8).T.contiguous(),
        tensors[".scales"].T.contiguous(),
    )


def _unpack_gptq(tensors: dict[str, torch.Tensor], second_version: bool) -> Unpacked:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    rows = (tensors[".qweight"][:, None, :] >> shifts[:, None]) & 15
    zeros = (tensors[".qzeros"][:, :, None] >> shifts) & 15
    zeros = zeros if second_version else zeros + 1
    return (
        (rows.flatten(0, 1) - 8).to(torch.int8).T.contiguous(),
        (zeros.flatten(1) - 8).to(torch.int8).T.contiguous(),
        tensors[".scales"].T.contiguous(),
    )
