"""The frozen weights behind adapters: floats, or the parts of a format that become floats for one product at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_rl.platform import bfloat16_loops
from qerl_rl.quant.formats import Format, Parts


@dataclass(frozen=True)
class Base:
    """The base weights [E, N, K] of E groups: one float tensor, or the parts of `format` in its order, E in front."""

    tensors: tuple[torch.Tensor, ...]
    format: Format | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self._matrix_shape[0]

    @property
    def inputs(self) -> int:
        """K."""
        return self._matrix_shape[1]

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        first = self.tensors[0]
        return self.format.matrix_shape(first) if self.format else (first.shape[1], first.shape[2])

    @property
    def row_scales(self) -> torch.Tensor | None:
        """[E, N] float32 where one scale a row is left out of the weights, to multiply the outputs by: there are fewer
        of those than of weights."""
        if self.format is None or self.format.group_size or self.format.parts[0].dtype != torch.int8:
            return None
        return self.tensors[1].squeeze(-1) if self.tensors[1].dtype == torch.float32 else None

    def parts(self) -> list[Parts]:
        """The parts [N, ...] of each group, by suffix (floats have none)."""
        suffixes = [part.suffix for part in self.format.parts] if self.format else [""]
        of_groups = zip(*(tensor.unbind() for tensor in self.tensors), strict=True)
        return [dict(zip(suffixes, tensors, strict=True)) for tensors in of_groups]


class Unpacker:
    """The floats [N, K] of a base, group after group, without the `row_scales` of the base.

    Args: dtype: of the floats; a base that is floats already keeps its own.
    """

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._format, self._dtype = base.format, dtype
        self._parts = base.parts()
        self._has_scales = base.row_scales is not None
        if self._has_scales:
            self._integers, self._scratch = (
                base.tensors[0].new_empty(base.outputs, base.inputs, dtype=kind) for kind in (dtype, torch.int8)
            )

    def matrix(self, group: int) -> torch.Tensor:
        """[N, K] of one group; valid until the next call."""
        parts = self._parts[group]
        if self._format is None:
            return parts[""]
        if self._has_scales:
            integers = self._format.unpacked(parts, self._scratch)[self._format.parts[0].suffix]
            if bfloat16_loops.has_loops(self._integers):
                return bfloat16_loops.convert_int8(integers, self._integers)
            return self._integers.copy_(integers)
        return self._format.dequantize(parts, self._dtype)
