"""What the linear layers and the experts share: a frozen or quantized base, and an adapter that can be switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from qerl_rl.config.schema import LoraConfig
from qerl_rl.model.base_weight import Base
from qerl_rl.quant.formats import Format


@dataclass(frozen=True)
class LayerWeights:
    """How a layer stores its weights: the format of each by name (floats where it has none), and any adapters."""

    formats: Mapping[str, Format]
    lora: LoraConfig | None


class AdaptedModule(torch.nn.Module):
    """Weights named X (a Parameter, or buffers X + suffix of the parts of a format) and adapters X_lora_A, X_lora_B."""

    def __init__(self, config: TransformerConfig, weights: LayerWeights) -> None:
        super().__init__()
        self.config = config
        self.formats = weights.formats
        self.lora = weights.lora
        self.adapters_enabled = weights.lora is not None
        self._adopted: dict[str, Base] = {}

    @property
    def scaling(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return 0.0 if self.lora is None else self.lora.alpha / self.lora.rank

    def add_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Allocate the base weight `name` [..., N, K], to be filled by load_hf; frozen beside an adapter."""
        if format := self.formats.get(name):
            for part in format.parts:
                self.register_buffer(name + part.suffix, torch.zeros(part.shape(shape), dtype=part.dtype))
        else:
            weight = Parameter(torch.empty(shape, dtype=self.config.params_dtype), requires_grad=self.lora is None)
            self.register_parameter(name, weight)

    def add_adapter(self, name: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
        """Allocate the adapter of the base weight `name`; both matrices are zero until `initialize_adapters`."""
        for matrix, shape in (("A", a_shape), ("B", b_shape)):
            parameter = Parameter(torch.zeros(shape, dtype=self.config.params_dtype))
            self.register_parameter(f"{name}_lora_{matrix}", parameter)

    def base(self, name: str) -> Base:
        """The base weight `name`, as grouped_linear takes it (without a dimension of groups where it has none)."""
        if adopted := self._adopted.get(name):
            return adopted
        format = self.formats.get(name)
        suffixes = [part.suffix for part in format.parts] if format else [""]
        return Base(tuple(getattr(self, name + suffix) for suffix in suffixes), format)

    def adopt(self, name: str, base: Base) -> None:
        """Read the quantized weight `name` out of `base`, whose tensors somebody else keeps, instead of own buffers."""
        for part in self.formats[name].parts:
            del self._buffers[name + part.suffix]
        self._adopted[name] = base

    def dense(self, name: str) -> torch.Tensor:
        """A copy of the base weight `name` [..., N, K], dequantized to float32; a float weight as it is."""
        base = self.base(name)
        if base.format is None:
            return base.tensors[0]
        if name in self._adopted:
            weight = torch.empty(len(base.tensors[0]), base.outputs, base.inputs)
            for parts, matrix in zip(base.parts(), weight, strict=True):
                matrix.copy_(base.format.dequantize(parts))
            return weight
        parts = {part.suffix: tensor for part, tensor in zip(base.format.parts, base.tensors, strict=True)}
        return base.format.dequantize(parts)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AdaptedModule:
        # model.bfloat16() casts every floating-point buffer, but a rounded part of a format is another weight.
        parts = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, exact in parts.items():
            if exact is not None and self._buffers[name].dtype != exact.dtype:  # type: ignore[union-attr]
                self._buffers[name] = exact.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self
