"""Weight formats: how the weights of a Linear layer, or of a stack of experts, are stored in fewer bits.

A format splits a weight [..., N, K] into parts, each a tensor of its own in a checkpoint: the packed integers, the
scales of groups of a row, sometimes one scale for the whole matrix. Names and layouts are those of the
compressed-tensors library, which vLLM, vLLM-Ascend and transformers read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.quant import w8a8

Parts = Mapping[str, torch.Tensor]
"""Tensor by the suffix of its part."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight [..., N, K]; X.weight's part is stored under the name X.weight + suffix.

    columns: how many weights of a row one element stands for; it divides K. 0: one element stands for a whole row.
    per_matrix: a checkpoint holds one element [1] for each matrix [N, K]; in memory, as in `Format.quantize`, it is
        repeated for each row, so that matrices can be fused and split.
    """

    suffix: str
    dtype: torch.dtype
    columns: int
    per_matrix: bool = False

    def shape(self, weight: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in memory of this part of a weight of shape [..., N, K]. Raises: ValueError when K does not divide."""
        *rows, width = weight
        if self.columns and width % self.columns:
            raise ValueError(f"rows of {width} weights can't be cut into parts of {self.columns}")
        return (*rows, width // self.columns if self.columns else 1)


class Format(ABC):
    """One format with its group size; `parts` come in the order in which they are stored."""

    name: str
    """The value of quant.format."""
    group_size: int
    """Weights of a row that share a scale; 0: the whole row does."""
    parts: tuple[Part, ...]

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest; tensor by suffix, with the shapes of `Part.shape`.

        Args: weight [..., N, K] of any float dtype; computed in float32, each matrix [N, K] for itself.
        Raises: ValueError when K is no multiple of the group size.
        """

    @abstractmethod
    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [..., N, K] that the parts stand for, as compressed-tensors computes it, then cast to `dtype`."""

    @abstractmethod
    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        """The `quantization_config` of config.json; ignore: names or re:patterns of Linear modules left as they are."""


class W8A8(Format):
    """int8 with a scale for each row; activations become int8 a token at a time."""

    name, group_size = "w8a8", 0
    parts = (Part("", torch.int8, 1), Part("_scale", torch.float32, 0))

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        quantized, scale = w8a8.quantize(weight)
        return {"": quantized, "_scale": scale}

    def dequantize(self, parts: Parts, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return w8a8.dequantize(parts[""], parts["_scale"], dtype)

    def quantization_config(self, ignore: list[str]) -> dict[str, Any]:
        return w8a8.quantization_config(ignore)


FORMATS: dict[str, Callable[[int], Format]] = {"w8a8": lambda group_size: W8A8()}
"""quant.format -> its Format, from a group size (0 takes the format's own)."""


def get_format(name: str, group_size: int = 0) -> Format:
    """The format of this name. Raises: ConfigError when there is none, or none with this group size."""
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown.", fix=f"set quant.format to one of {', '.join(FORMATS)}")
    return FORMATS[name](group_size)
