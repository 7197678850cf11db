"""What the linear layers and the experts share: a frozen or int8 base, and an adapter that can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import Parameter

from qerl_rl.config.schema import LoraConfig
from qerl_rl.model.grouped_linear import Base


@dataclass(frozen=True)
class WeightFormat:
    """How a layer stores its weights: `quantized` int8 with scales or floats, and the adapter beside them, if any."""

    quantized: bool
    lora: LoraConfig | None


class AdaptedModule(torch.nn.Module):
    """Weights named X (Parameter, or int8 buffer with X_scale float32) and adapters X_lora_A, X_lora_B."""

    def __init__(self, config: TransformerConfig, weights: WeightFormat) -> None:
        super().__init__()
        self.config = config
        self.quantized = weights.quantized
        self.lora = weights.lora
        self.adapters_enabled = weights.lora is not None

    @property
    def scaling(self) -> float:
        """What the product of an adapter's matrices is multiplied by."""
        return 0.0 if self.lora is None else self.lora.alpha / self.lora.rank

    def add_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Allocate the base weight `name` [..., N, K], to be filled by load_hf; frozen beside an adapter."""
        if self.quantized:
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8))
            self.register_buffer(f"{name}_scale", torch.zeros(*shape[:-1], 1, dtype=torch.float32))
        else:
            weight = Parameter(torch.empty(shape, dtype=self.config.params_dtype), requires_grad=self.lora is None)
            self.register_parameter(name, weight)

    def add_adapter(self, name: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
        """Allocate the adapter of the base weight `name`; both matrices are zero until `initialize_adapters`."""
        for matrix, shape in (("A", a_shape), ("B", b_shape)):
            parameter = Parameter(torch.zeros(shape, dtype=self.config.params_dtype))
            self.register_parameter(f"{name}_lora_{matrix}", parameter)

    def base(self, name: str) -> Base:
        """The base weight `name`, as grouped_linear takes it."""
        return Base(getattr(self, name), getattr(self, f"{name}_scale", None))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AdaptedModule:
        # model.bfloat16() casts every floating-point buffer, but a rounded scale is another weight.
        scales = {name: buffer for name, buffer in self._buffers.items() if name.endswith("_scale")}
        super()._apply(fn, recurse)
        for name, exact in scales.items():
            if exact is not None and self._buffers[name].dtype != exact.dtype:  # type: ignore[union-attr]
                self._buffers[name] = exact.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self
