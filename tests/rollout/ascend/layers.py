"""Layers of vllm-ascend, made, filled and processed by its own methods, out of parts of our formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch

from qerl_rl.quant.formats import Format, get_format
from qerl_rl.quant.modelslim_w4a8 import VERSION, W4A8Dynamic, scale_bias
from tests.rollout.ascend.wheel import METHODS

HIDDEN, WIDTH, EXPERTS, OUTPUTS = 128, 256, 4, 192
Importer = Callable[[str], ModuleType]
Tensors = dict[str, torch.Tensor]


class Kind(NamedTuple):
    """A scheme by its class, and the format whose parts it is filled with."""

    module: str
    scheme: str
    format: Format | None
    description: dict[str, Any]


def _int4_description(group_size: int) -> dict[str, Any]:
    """What vllm-ascend's configuration of compressed-tensors notes when it meets int4 weights and int8 activations."""
    strategy = "group" if group_size else "channel"
    quantized = {"ascend_quant_method": "compressed-tensors", "weight_strategy": strategy, "version": "0"}
    return {**quantized, "group_size": group_size}


def _slim_description(group_size: int) -> dict[str, Any]:
    return {"version": VERSION, "group_size": group_size}


W4A8_EXPERTS = "AscendW4A8DynamicFusedMoEMethod"
EXPERT_KINDS = {
    "w8a8": Kind(f"{METHODS}.w8a8_dynamic", "AscendW8A8DynamicFusedMoEMethod", get_format("w8a8"), {}),
    "w4a16": Kind(f"{METHODS}.w4a16", "AscendW4A16FusedMoEMethod", get_format("w4a16", 32), {"group_size": 32}),
    "w4a8": Kind(f"{METHODS}.w4a8", W4A8_EXPERTS, get_format("w4a8", -1), _int4_description(0)),
    "w4a8, groups": Kind(f"{METHODS}.w4a8", W4A8_EXPERTS, get_format("w4a8", 64), _int4_description(64)),
    "w4a8, msmodelslim": Kind(f"{METHODS}.w4a8", W4A8_EXPERTS, W4A8Dynamic(0), _slim_description(0)),
    "w4a8, msmodelslim, groups": Kind(f"{METHODS}.w4a8", W4A8_EXPERTS, W4A8Dynamic(64), _slim_description(64)),
    "mxfp8": Kind(f"{METHODS}.w8a8_mxfp8", "AscendW8A8MXFP8DynamicFusedMoEMethod", get_format("mxfp8"), {}),
    "bfloat16": Kind("vllm_ascend.ops.fused_moe.fused_moe", "AscendUnquantizedFusedMoEMethod", None, {}),
}
LINEAR_KINDS = {
    "w8a8": Kind(f"{METHODS}.w8a8_dynamic", "AscendW8A8DynamicLinearMethod", get_format("w8a8"), {}),
    "mxfp8": Kind(f"{METHODS}.w8a8_mxfp8", "AscendW8A8MXFP8DynamicLinearMethod", get_format("mxfp8"), {}),
    "bfloat16": Kind("vllm_ascend.ops.linear", "AscendUnquantizedLinearMethod", None, {}),
}


class Shard(NamedTuple):
    """What a rank holds of the experts: some of them (expert parallel), some of their width (tensor parallel)."""

    experts: slice = slice(None)
    width: slice = slice(None)


WHOLE = Shard()


def expert_parts(format: Format | None, seed: int, shard: Shard = WHOLE) -> Tensors:
    """A rank's tensors of a random checkpoint's experts, by the names of vLLM's parameters."""
    generator = torch.Generator().manual_seed(seed)
    first, last = (torch.randn(EXPERTS, *size, generator=generator) for size in ((2, WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    found: Tensors = {}
    for name, weight in (("w13", first), ("w2", last)):
        for suffix, part in parts_of(format, weight).items():
            own = part[shard.experts]
            if name == "w13":
                own = own[:, :, shard.width].flatten(1, 2)
            else:
                # Where a row is shared, all ranks have its scale.
                own = own[..., _columns(shard.width, WIDTH, own.shape[-1])]
            found[f"{name}_weight{suffix}"] = own.clone()
    return found


def linear_parts(format: Format | None, seed: int, inputs: int = HIDDEN) -> Tensors:
    weight = torch.randn(OUTPUTS, inputs, generator=torch.Generator().manual_seed(seed))
    return {f"weight{suffix}": part for suffix, part in parts_of(format, weight).items()}


def parts_of(format: Format | None, weight: torch.Tensor) -> Tensors:
    return {"": weight.bfloat16()} if format is None else format.quantize(weight)


def _columns(width: slice, whole: int, stored: int) -> slice:
    start, stop, _ = width.indices(whole)
    return slice(None) if stored == 1 else slice(start * stored // whole, stop * stored // whole)


def experts_of(load: Importer, kind: Kind, count: int, width: int, hidden: int = HIDDEN) -> torch.nn.Module:
    """A layer with this many experts of this width, its parameters zeros."""
    scheme = getattr(load(kind.module), kind.scheme)
    layer = torch.nn.Module()
    if kind.format is None:
        layer.quant_method = scheme(None)
        # vLLM's own parameters.
        _register(layer, w13_weight=(count, 2 * width, hidden), w2_weight=(count, hidden, width))
    else:
        adapters = load("vllm_ascend.quantization.method_adapters")
        layer.quant_method = adapters.AscendFusedMoEMethod(scheme(), None)
        layer.quant_method.create_weights(layer, count, hidden, width, torch.bfloat16, weight_loader=None)
    return _zeroed(layer)


def _register(layer: torch.nn.Module, **shapes: tuple[int, ...]) -> None:
    for name, shape in shapes.items():
        weight = torch.empty(shape, dtype=torch.bfloat16)
        layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))


def linear_of(load: Importer, kind: Kind, inputs: int = HIDDEN, outputs: int = OUTPUTS) -> torch.nn.Module:
    """A linear layer, its parameters zeros."""
    scheme = getattr(load(kind.module), kind.scheme)
    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.self_attn.qkv_proj"
    if kind.format is None:
        layer.quant_method = scheme()
        _register(layer, weight=(outputs, inputs))
    else:
        layer.quant_method = load("vllm_ascend.quantization.method_adapters").AscendLinearMethod(scheme())
        layer.quant_method.create_weights(layer, inputs, [outputs], inputs, outputs, torch.bfloat16, weight_loader=None)
    return _zeroed(layer)


def _zeroed(layer: torch.nn.Module) -> torch.nn.Module:
    """Parameters that no checkpoint of ours has (offsets) are zeros in those of others."""
    for parameter in layer.parameters():
        parameter.data.zero_()
    return layer


def fill(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put a checkpoint's tensors into a new layer's parameters, as vLLM's loaders do; vllm-ascend processes it."""
    for name, tensor in _as_stored(layer, tensors).items():
        parameter = layer.get_parameter(name)
        assert parameter.shape == tensor.shape, name
        parameter.data.copy_(tensor)
    layer.quant_method.process_weights_after_loading(layer)


def _as_stored(layer: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Parts of a layer as its checkpoint has them: otherwise than in memory in msmodelslim's layout of W4A8."""
    scheme = getattr(layer.quant_method, "quant_method", None)
    if not getattr(scheme, "new_quant_version", False):
        return tensors
    found: Tensors = {}
    for name, module in (("w13", "up_proj"), ("w2", "down_proj")):
        parts = zip(tensors[f"{name}_weight"], tensors[f"{name}_weight_scale"], strict=True)
        experts = [{"": weight, "_scale": scale} for weight, scale in parts]
        stored = [W4A8Dynamic(scheme.group_size).stored(expert) for expert in experts]
        found |= {f"{name}_weight{suffix}": torch.stack([each[suffix] for each in stored]) for suffix in stored[0]}
        biases = [scale_bias(f"0.{module}.weight", expert) for expert in experts]
        found[f"{name}_scale_bias"] = torch.stack(biases)
    return found


def held(layer: torch.nn.Module) -> Tensors:
    """Every tensor of a layer, parameters and plain attributes alike."""
    found: Tensors = {name: parameter.data for name, parameter in layer.named_parameters()}
    return found | {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
