"""compressed-tensors' own way from a matrix to what a checkpoint holds, and back: the oracle of every format."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from qerl_rl.quant.base import Format


def scheme_of(format: Format) -> tuple[QuantizationScheme, type]:
    """The preset that the format stands for with its group size, and the library's compressor for it."""
    preset = {"w8a8": "W8A8", "w4a16": "W4A16", "w4a8": "W4A8"}.get(format.name, f"{format.name.upper()}A16")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if preset.startswith("W4"):
        scheme.weights.group_size = format.group_size or None
        scheme.weights.strategy = "group" if format.group_size else "channel"
    return scheme, BaseCompressor.get_value_from_registry(format.layout())


def library_compress(format: Format, weight: torch.Tensor, largest: torch.Tensor | None = None) -> dict:
    """One matrix [N, K], in float32; int4 scales of groups become bfloat16, as they are in a bfloat16 model."""
    scheme, compressor = scheme_of(format)
    weight = weight.float()
    groups = weight.unflatten(-1, (-1, format.group_size or weight.shape[1]))
    state = {"weight": weight}
    if scheme.weights.strategy == "tensor_group":
        limit = weight.abs().max() if largest is None else largest
        state["weight_global_scale"] = generate_gparam(-limit, limit)
    if scheme.weights.strategy == "group" and scheme.weights.type == "int":
        scheme.weights.scale_dtype = torch.bfloat16
    scale, zero_point = calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    if scheme.weights.strategy == "group" and scheme.weights.type == "int":
        scale = scale.to(torch.bfloat16)
    return compressor.compress(state | {"weight_scale": scale, "weight_zero_point": zero_point}, scheme)


def library_decompress(format: Format, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    scheme, compressor = scheme_of(format)
    return compressor.decompress(dict(tensors), scheme)["weight"]


def linear_modules(names: list[str]) -> torch.nn.Module:
    """A model with a Linear for each matrix [N, K] of these weights, as engines build it."""
    root = torch.nn.Module()
    for name in names:
        module = root
        *parents, leaf = name.removesuffix(".weight").split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.add_module(leaf, torch.nn.Linear(1, 1))
    return root
