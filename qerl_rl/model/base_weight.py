"""The frozen weights behind adapters: floats, or the parts of a format that become floats for one product at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class Base:
    """The base weights [E, N, K] of E groups: one float tensor, or the parts of `format` in its order, E in front."""

    tensors: tuple[torch.Tensor, ...]
    format: Format | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.tensors[0].shape[1]

    @property
    def inputs(self) -> int:
        """K."""
        return self.tensors[0].shape[2] * (self.format.parts[0].columns if self.format else 1)

    @property
    def scales_outputs(self) -> bool:
        """Whether one scale a row is left out of the weights, to multiply the outputs: there are fewer of those."""
        return self.format is not None and self.format.group_size == 0 and self.tensors[0].dtype == torch.int8

    def row_scale(self, group: int) -> torch.Tensor:
        """[1, N] float32 of one group, where `scales_outputs`."""
        return self.tensors[1][group].t()


class Unpacker:
    """Floats [N, K] of a base, group after group, in the same memory.

    Args: dtype: of the floats.
    """

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base, self._dtype = base, dtype
        device = base.tensors[0].device
        self._floats, self._pairs = torch.empty(0), torch.empty(0)
        self._is_int4 = base.format is not None and base.format.name in ("w4a16", "w4a8") and base.format.group_size > 0
        if base.scales_outputs:
            self._floats = torch.empty(base.outputs, base.inputs, dtype=dtype, device=device)
        elif self._is_int4:
            self._floats = torch.empty(base.outputs, base.inputs, dtype=base.tensors[1].dtype, device=device)
            if base.tensors[0].dtype == torch.int32:
                self._pairs = torch.empty(2, base.outputs, base.inputs // 2, dtype=torch.int16, device=device)

    def matrix(self, group: int) -> torch.Tensor:
        """The weights of one group, without row scales where the base `scales_outputs`; valid until the next call."""
        base = self._base
        if base.format is None:
            return base.tensors[0][group]
        if base.scales_outputs:
            return self._floats.copy_(base.tensors[0][group])
        if self._is_int4:
            return self._int4(base.tensors[0][group], base.tensors[1][group]).to(self._dtype)
        parts = {part.suffix: tensor[group] for part, tensor in zip(base.format.parts, base.tensors, strict=True)}
        return base.format.dequantize(parts, self._dtype)

    def _int4(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values of `Format.dequantize`, in the type of the scales, in about a third of its time."""
        if codes.dtype == torch.int32:
            pairs, shifted = self._pairs
            pairs.copy_(codes.view(torch.uint8))
            torch.bitwise_left_shift(pairs, 4, out=shifted)
            codes = pairs.bitwise_or_(shifted).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
        self._floats.copy_(codes).view(*scale.shape, -1).mul_(scale[..., None])
        return self._floats


def scale_columns(y: torch.Tensor, row_scale: torch.Tensor) -> torch.Tensor:
    """y [T, N] times row_scale [1, N] float32, in place, rounded once."""
    if y.dtype == row_scale.dtype:
        return y.mul_(row_scale)
    # (y.mul_ of mixed types gives the same bits and takes four times as long on CPU.)
    return y.copy_(y.float().mul_(row_scale))
