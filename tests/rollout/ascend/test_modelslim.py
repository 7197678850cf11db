"""Checkpoints in msmodelslim's layout, as vllm-ascend itself takes them: its description, parameters and processing.

Its real code runs here, on a CPU. What its kernels then get is unpacked as they read it: eight signed int4 in an int32,
the first in the lowest bits; a scale's float32 bits in the lower half of an int64; int8 activations as 16 times their
upper half plus their lower half less 8, for which the bias makes up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.modelslim_w4a8 import unpack_rows
from tests.rollout.ascend import layers, wheel

CONFIG = "vllm_ascend.quantization.modelslim_config"
EXPERTS = "model.layers.1.mlp.experts"
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "w4a8, rows": {"format": "w4a8", "group_size": -1, "attention": "w8a8"},
    "w4a8, groups": {"format": "w4a8", "group_size": 32},
    "w4a16": {"format": "w4a16", "group_size": 32, "attention": "none"},
}
W4A8 = ("w4a8, rows", "w4a8, groups")
SCHEMES = {
    "w4a8, rows": ("AscendW4A8DynamicFusedMoEMethod", "AscendW8A8DynamicLinearMethod"),
    "w4a8, groups": ("AscendW4A8DynamicFusedMoEMethod", "AscendW4A8DynamicLinearMethod"),
    "w4a16": ("AscendW4A16FusedMoEMethod", None),
}


class Ascend:
    """vllm-ascend's reading of a folder's description."""

    def __init__(self, load: layers.Importer, described: dict[str, Any]) -> None:
        self._load, self._module = load, load(CONFIG)
        self.config = self._module.AscendModelSlimConfig(described)
        self._fused = self._module.packed_modules_model_mapping["qwen3_moe"]

    def scheme(self, module: str, kind: str) -> Any:
        """The scheme of a layer (`linear` or `moe`); None where it stays as it is."""
        if self.config.is_layer_skipped_ascend(module, self._fused):
            return None
        return self._module.create_scheme_for_layer(self.config.quant_description, module, kind, self._fused)

    def experts(self, folder: Path) -> torch.nn.Module:
        """A layer of its own with the parameters of all experts, filled as vLLM fills them, not processed."""
        reader = CheckpointReader(folder)
        count = len([name for name in reader.weights() if name.startswith(EXPERTS) and ".up_proj." in name])
        hidden, width = reader.weight_shape(f"{EXPERTS}.0.down_proj.weight")
        layer, adapters = torch.nn.Module(), self._load("vllm_ascend.quantization.method_adapters")
        layer.quant_method = adapters.AscendFusedMoEMethod(self.scheme(EXPERTS, "moe"), None)
        layer.quant_method.create_weights(layer, count, hidden, width, torch.bfloat16, weight_loader=None)
        for name, parameter in layer.named_parameters():
            which, _, kind = name.partition("_")
            shards = ("gate_proj", "up_proj") if which == "w13" else ("down_proj",)
            if f"{EXPERTS}.0.{shards[0]}.{kind}" not in reader:
                parameter.data.zero_()
                continue
            names = [[f"{EXPERTS}.{expert}.{shard}.{kind}" for shard in shards] for expert in range(count)]
            stored = torch.stack([torch.cat([reader.get(each) for each in of_expert]) for of_expert in names])
            if kind == "weight_shape":
                stored = stored[:, :2].int()
            assert (stored.shape, stored.dtype) == (parameter.shape, parameter.dtype), name
            parameter.data.copy_(stored)
        kinds = {name.partition("_")[2] for name, _ in layer.named_parameters()}
        assert {name.rpartition(".")[2] for name in reader if name.startswith(f"{EXPERTS}.")} <= kinds
        return layer


def _quint4x2(weight: torch.Tensor, scale: torch.Tensor, *ignored: Any) -> torch.Tensor:
    """npu_quantize to quint4x2 with a scale of one: eight int4 of a row in an int32."""
    return wheel.int4pack(weight.int().flatten(0, -2)).view(*weight.shape[:-1], -1)


@contextmanager
def ascend(described: dict[str, Any]) -> Iterator[Ascend]:
    given = wheel.given(described, wheel.AscendConfig())
    given["torch_npu"] = given["torch_npu"] | {"npu_quantize": _quint4x2}
    with wheel.wheel(*wheel.MODULES, CONFIG, given=given) as load:
        for scheme in ("w8a8_dynamic", "w4a16", "w4a8"):
            load(f"{wheel.METHODS}.{scheme}")
        load(wheel.METHODS).get_scheme_class = load(f"{wheel.METHODS}.registry").get_scheme_class
        yield Ascend(load, described)


@pytest.fixture
def written(tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]) -> Callable[[str], Path]:
    source = tiny_checkpoint("qwen3_moe", "bfloat16", layers=2)
    return lambda name: tiny_quantized(source, **CHECKPOINTS[name], layout="msmodelslim")


def _description(folder: Path) -> dict[str, Any]:
    return json.loads((folder / ModelSlimFormats.file_name).read_text())


def _numbers(packed: torch.Tensor) -> torch.Tensor:
    """int32 [..., N / 8] -> float64 [..., N]."""
    return torch.stack([(packed << 28 - 4 * place) >> 28 for place in range(8)], -1).flatten(-2).double()


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """What a kernel gets for scales, as float64 [E, groups or 1, N]."""
    assert stored.dtype == torch.int64
    assert not (stored >> 32).any()
    return stored.int().view(torch.float32).double().view(stored.shape[0], -1, stored.shape[-1])


def _weights(folder: Path, which: str) -> torch.Tensor:
    """What the checkpoint stands for here: float64 [E, K, N], gate above up."""
    with CheckpointReader(folder) as reader:
        names = [name for name in reader.weights() if name.startswith(EXPERTS)]
        experts = range(len({name.split(".")[5] for name in names}))
        shards = ("gate_proj", "up_proj") if which == "w13" else ("down_proj",)
        found = [torch.cat([reader.weight(f"{EXPERTS}.{e}.{shard}.weight") for shard in shards]) for e in experts]
    return torch.stack(found).double().transpose(1, 2)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_description_names_schemes_that_vllm_ascend_has(name: str, written: Callable[[str], Path]) -> None:
    with ascend(_description(written(name))) as engine:
        schemes = [engine.scheme(EXPERTS, "moe"), engine.scheme("model.layers.0.self_attn.qkv_proj", "linear")]
        assert engine.scheme("model.layers.0.mlp.gate", "linear") is None
    assert tuple(type(scheme).__name__ if scheme else None for scheme in schemes) == SCHEMES[name]


@pytest.mark.parametrize("name", W4A8)
def test_kernels_get_the_weights_of_w4a8_experts_exactly(name: str, written: Callable[[str], Path]) -> None:
    folder = written(name)
    _check_experts(folder, _description(folder))


def _check_experts(folder: Path, described: dict[str, Any], scale_error: float = 0.0) -> None:
    """Args: scale_error: how far, relative to it, the scales that the bias was made of may be from the kernels'."""
    with ascend(described) as engine:
        layer = engine.experts(folder)
        layer.quant_method.process_weights_after_loading(layer)
    held, generator = layers.held(layer), torch.Generator().manual_seed(0)
    for which in ("w13", "w2"):
        numbers, scales = _numbers(held[f"{which}_weight"]), _scales(held[f"{which}_weight_scale"])
        weights = (numbers.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1, 2)
        expected = _weights(folder, which)
        assert torch.equal(weights.float().double(), expected)
        activations = torch.randint(-128, 128, (3, expected.shape[1]), dtype=torch.int8, generator=generator)
        upper, lower = (activations >> 4).double(), (activations & 15).double() - 8
        assert held[f"{which}_scale_bias"].dtype == torch.float32
        outputs = 16 * (upper @ weights) + lower @ weights + held[f"{which}_scale_bias"].double()[:, None]
        # The bias is a sum of K float32 products: each addition, and each product, is off by 2**-24 at most.
        error = expected.shape[1] * 2.0**-23 + scale_error
        bound = 8 * error * weights.abs().sum(1, keepdim=True)
        assert ((outputs - activations.double() @ weights).abs() <= bound).all()


def test_kernels_get_the_weights_of_w4a16_experts_exactly(written: Callable[[str], Path]) -> None:
    folder = written("w4a16")
    with ascend(_description(folder)) as engine:
        layer = engine.experts(folder)
        layer.quant_method.process_weights_after_loading(layer)
    held = layers.held(layer)
    for which in ("w13", "w2"):
        numbers, scales = _numbers(held[f"{which}_weight_packed"]), held[f"{which}_weight_scale"].double()
        weights = (numbers.unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1, 2)
        # Here, as in the library, products are rounded to the type of the scales.
        assert torch.equal(weights.bfloat16().double(), _weights(folder, which))


def test_kernels_get_the_weights_of_w4a8_linear_layers_exactly(written: Callable[[str], Path]) -> None:
    folder, prefix = written("w4a8, groups"), "model.layers.0.self_attn"
    with ascend(_description(folder)) as engine, CheckpointReader(folder) as reader:
        for shards, kind in ((("q_proj", "k_proj", "v_proj"), "column"), (("o_proj",), "row")):
            scheme = engine.scheme(f"{prefix}.{'qkv_proj' if len(shards) > 1 else shards[0]}", "linear")
            expected = torch.cat([reader.weight(f"{prefix}.{shard}.weight") for shard in shards])
            outputs, inputs = expected.shape
            made = scheme.get_weight(inputs, outputs, torch.bfloat16)
            assert (made.pop("_packed_dim"), made.pop("_packed_factor")) == (0, 2)
            made |= scheme.get_pergroup_param(inputs, outputs, torch.bfloat16, layer_type=kind)
            layer = torch.nn.Module()
            for name, empty in made.items():
                stored = torch.cat([reader.get(f"{prefix}.{shard}.{name}") for shard in shards])
                assert stored.shape == empty.shape, name
                # Parameters of linear layers are bfloat16, which holds the same numbers.
                assert name == "scale_bias" or torch.equal(stored.to(empty.dtype).float(), stored.float())
                layer.register_parameter(name, torch.nn.Parameter(stored.to(empty.dtype), requires_grad=False))
            scheme.process_weights_after_loading(layer)
            numbers, scales = _numbers(layer.weight), layer.weight_scale_second.double()
            weights = (numbers.unflatten(0, (len(scales), -1)) * scales[:, None]).flatten(0, 1)
            assert torch.equal(weights, expected.double().t())


@pytest.mark.parametrize("version", ["1.0.0", None])
def test_two_levels_of_scales_that_msmodelslim_chose_are_read_as_kernels_get_them(
    version: str | None, written: Callable[[str], Path], tmp_path: Path
) -> None:
    """Version 1.0.0, and the layout before it: a number a byte, no bias."""
    source = written("w4a8, groups")
    tensors, generator = load_file(source / "model.safetensors"), torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight, second = name.removesuffix("_scale"), f"{name}_second"
        # First levels stand for the steps of int8, second ones for how many of those make a step of int4.
        tensors[name] = (torch.rand(tensors[name].shape, generator=generator) + 0.5) / 1000
        tensors[second] = (torch.rand(tensors[second].shape, generator=generator) + 0.5) * 18
        products = unpack_rows(tensors[weight]).float().unflatten(1, (tensors[second].shape[1], -1))
        products = (products * (tensors[name] * tensors[second]).half().float()[..., None]).flatten(1)
        bias = f"{weight.removesuffix('weight')}scale_bias"
        pieces = tensors[bias].shape[1]
        tensors[bias] = 8 * products.unflatten(1, (pieces, -1)).sum(-1)
        if version is None:
            tensors[weight] = unpack_rows(tensors[weight])
            del tensors[bias]
    described = _description(source)
    if version is None:
        del described["version"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / ModelSlimFormats.file_name).write_text(json.dumps(described))
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    # The bias of the older layout is vllm-ascend's own, of scales before they are rounded to float16 (by 2**-11).
    _check_experts(tmp_path, described, 0.0 if version else 2.0**-10)
