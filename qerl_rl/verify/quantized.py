"""What quantization does to a model, layer by layer: in the HF model, whose weights are rounded where they lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qerl_rl.algorithms.kl import full_kl
from qerl_rl.quant.base import Format
from qerl_rl.quant.formats import get_format
from qerl_rl.verify.reference import Trace, logits

_ACTIVATIONS = {"w8a8": "w8a8", "w4a8": "w8a8", "mxfp8": "mxfp8"}
"""quant.format -> the format whose numbers the inputs of its products are rounded to, a token a row; others stay."""

_FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.experts.gate_up_proj",),
    ("mlp.experts.down_proj",),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ("mlp.shared_expert.down_proj",),
    *((f"self_attn.{name}",) for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    ("mlp.shared_experts.down_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The quantized weights of a HF layer; those that engines fuse together."""


@dataclass(frozen=True)
class Twin:
    """A quantized twin of the HF model `exact`: with weights rounded to `format`, or those of `weights`, another model.

    format: also says how activations are rounded. kept: layers that the twin left as they are.
    """

    exact: Any
    format: Format
    weights: Any | None = None
    kept: frozenset[int] = frozenset()

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.exact.model.layers)

    @contextmanager
    def quantized(self, layers: Collection[int]) -> Iterator[Any]:
        """`exact` with these layers quantized, for as long as the block lasts."""
        originals: list[tuple[Tensor, Tensor]] = []
        try:
            for index in set(layers) - self.kept:
                for group in _weights(self.exact, index):
                    originals += [(weight, weight.clone()) for _, weight in group]
                    for (_, weight), rounded in zip(group, self._rounded(index, group), strict=True):
                        weight.copy_(rounded)
            with _RoundedActivations(self.format, [weight for weight, _ in originals]):
                yield self.exact
        finally:
            for weight, original in originals:
                weight.copy_(original)

    def _rounded(self, index: int, group: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        if self.weights is not None:
            layer = self.weights.model.layers[index]
            return [find_weight(layer, name) for name, _ in group]
        largest = torch.stack([weight.abs().amax((-1, -2)) for _, weight in group]).amax(0)
        return [self.format.dequantize(self.format.quantize(weight, largest)) for _, weight in group]


def _weights(model: Any, index: int) -> list[list[tuple[str, Tensor]]]:
    layer = model.model.layers[index]
    groups = [[name for name in group if has_module(layer, name)] for group in _FUSED]
    return [[(name, find_weight(layer, name)) for name in group] for group in groups if group]


def has_module(layer: Any, name: str) -> bool:
    """Whether a layer has this Linear module or this stack of experts' weights."""
    for part in name.split("."):
        layer = getattr(layer, part, None)
    return layer is not None


def find_weight(layer: Any, name: str) -> Tensor:
    """The weight of a Linear module, or the stack of experts' weights, in a HF layer."""
    for part in name.split("."):
        layer = getattr(layer, part)
    return layer.data if isinstance(layer, torch.Tensor) else layer.weight.data


class _RoundedActivations(TorchFunctionMode):
    """Inside, the inputs of products with `weights` (or slices of them) are rounded as `format`'s kernels do."""

    def __init__(self, format: Format, weights: Sequence[Tensor]) -> None:
        super().__init__()
        name = _ACTIVATIONS.get(format.name)
        self._format = get_format(name) if name else None
        self._memory = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function is torch.nn.functional.linear and self._format is not None:
            inputs, weight, *others = args
            if weight.untyped_storage().data_ptr() in self._memory and inputs.numel():
                rounded = self._format.dequantize(self._format.quantize(inputs)).to(inputs.dtype)
                return function(rounded, weight, *others, **named)
        return function(*args, **named)


@torch.no_grad()
def expert_cosines(twin: Twin, exact: Trace) -> list[float]:
    """By layer, the cosine of what quantized and exact experts make of the exact layer's inputs, mean over tokens."""
    found = []
    for index in range(twin.layers):
        with twin.quantized([index]) as model:
            output = model.model.layers[index].mlp(exact.expert_inputs[index][None])[0]
        found.append(mean_cosine(output, exact.experts[index]))
    return found


@torch.no_grad()
def divergence(twin: Twin, layers: Collection[int], sequences: Sequence[Tensor], exact: Trace) -> float:
    """KL(exact || these layers quantized) of the next token, over the whole vocabulary, nats, mean over T tokens."""
    with twin.quantized(layers) as model:
        return mean_divergence(exact.logits, logits(model, sequences))


def mean_divergence(one: Tensor, other: Tensor) -> float:
    """KL of two models' next tokens from their logits [T, V], nats, mean over T."""
    return float(full_kl(one.double(), other.double()).mean())


def mean_cosine(one: Tensor, other: Tensor) -> float:
    """Mean over T of the cosines of [T, H] rows."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).mean())
