"""The frozen weights behind adapters: floats, or the parts of a format that become floats for one product at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_rl.quant.formats import Format
from qerl_rl.quant.int4 import W4A8, W4A16


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
    def row_scales(self) -> torch.Tensor | None:
        """[E, N] float32 where one scale a row is left out of the weights, to multiply the outputs by: there are fewer
        of those than of weights."""
        if self.format is None or self.format.group_size or self.tensors[0].dtype != torch.int8:
            return None
        return self.tensors[1].squeeze(-1) if self.tensors[1].dtype == torch.float32 else None


class Unpacker:
    """The floats [N, K] of a base, group after group in the same memory, without the `row_scales` of the base.

    Args: dtype: of the floats; a base that is floats already keeps its own.
    """

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self._base, self._format = base, base.format
        self._is_int4 = type(base.format) in (W4A16, W4A8) and base.row_scales is None
        if base.format is None:
            return
        size, device = (base.outputs, base.inputs), base.tensors[0].device
        self._weights = torch.empty(size, dtype=dtype, device=device)
        if self._is_int4:
            # The product with a scale is rounded to the type of the scales, in which the engines multiply.
            scales = base.tensors[1]
            own = dtype == scales.dtype
            self._products = self._weights if own else torch.empty(size, dtype=scales.dtype, device=device)
            self._pairs = torch.empty(2, size[0], size[1] // 2, dtype=torch.int16, device=device)

    def matrix(self, group: int) -> torch.Tensor:
        """[N, K] of one group; valid until the next call."""
        tensors = [tensor[group] for tensor in self._base.tensors]
        if self._format is None:
            return tensors[0]
        if self._base.row_scales is not None:
            return self._weights.copy_(tensors[0])
        if self._is_int4:
            return self._unpack_int4(*tensors)
        parts = {part.suffix: tensor for part, tensor in zip(self._format.parts, tensors, strict=True)}
        return self._weights.copy_(self._format.dequantize(parts, self._weights.dtype))

    def _unpack_int4(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What `Format.dequantize` gives, without its temporaries."""
        if codes.dtype == torch.int32:
            pairs, shifted = self._pairs
            pairs.copy_(codes.view(torch.uint8))
            torch.bitwise_left_shift(pairs, 4, out=shifted)
            codes = pairs.bitwise_or_(shifted).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
        self._products.copy_(codes)
        self._products.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1))
        return self._products if self._products is self._weights else self._weights.copy_(self._products)
