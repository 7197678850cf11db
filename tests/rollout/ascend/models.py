"""A rank's model out of vllm-ascend's layers, with the module names of vLLM 0.23 and weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from qerl_rl.layout.engine import EngineLayout
from qerl_rl.quant.modelslim_w4a8 import W4A8Dynamic
from qerl_rl.rollout.full_tensors import put
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.weight_target import FIRST_OF_FUSED
from tests.rollout.ascend.layers import EXPERT_KINDS, LINEAR_KINDS, Importer, Tensors, experts_of, fill, linear_of
from tests.rollout.ascend.layers import held as layer_tensors
from tests.rollout.shards import full_weights


class VocabParallelEmbedding(torch.nn.Module):
    """vLLM's, as far as it holds a weight; the output layer is one too."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)


class Norm(torch.nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16), requires_grad=False)


def build(load: Importer, plan: LoadPlan, plain: EngineLayout, rank: int) -> torch.nn.Module:
    """A model with the shapes that `rank` of the layout of unquantized weights has, its parameters zeros."""
    root = torch.nn.Module()
    shapes = plain.local_shapes(rank)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in shapes):
        parent, _, name = path.rpartition(".")
        owner = module_at(root, parent)
        if name == "experts":
            count, hidden, width = shapes[f"{path}.w2_weight"]
            kind = EXPERT_KINDS[_format(plan, f"{path}.0.gate_proj.weight")]
            layer = experts_of(load, kind, count, width, hidden)
            layer.hidden_size, layer.intermediate_size_per_partition, layer.local_num_experts = hidden, width, count
            owner.add_module(name, layer)
        elif name in ("embed_tokens", "lm_head"):
            owner.add_module(name, VocabParallelEmbedding(shapes[f"{path}.weight"]))
        elif len(shapes[f"{path}.weight"]) == 1:
            owner.add_module(name, Norm(shapes[f"{path}.weight"]))
        else:
            outputs, inputs = shapes[f"{path}.weight"]
            kind = LINEAR_KINDS[_format(plan, f"{parent}.{FIRST_OF_FUSED.get(name, name)}.weight")]
            layer = linear_of(load, kind, inputs, outputs)
            layer.output_partition_sizes, layer.output_size = [outputs], outputs
            layer.input_size = layer.input_size_per_partition = inputs
            owner.add_module(name, layer)
    return root


def module_at(root: torch.nn.Module, path: str) -> torch.nn.Module:
    for name in path.split(".") if path else ():
        if name not in dict(root.named_children()):
            root.add_module(name, torch.nn.Module())
        root = root.get_submodule(name)
    return root


def _format(plan: LoadPlan, weight: str) -> str:
    """The kind of layer that this weight is part of."""
    format = plan.stored_format(weight)
    if format is None:
        return "bfloat16"
    return f"{format.name}, msmodelslim" if isinstance(format, W4A8Dynamic) else format.name


def load_into(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill a new model with a rank's tensors of a checkpoint, and let vllm-ascend process its layers."""
    for path, layer in model.named_modules():
        own = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == path}
        if own:
            if hasattr(layer, "quant_method"):
                fill(layer, own)
            else:
                layer.weight.data.copy_(own["weight"])


def metadata(model: torch.nn.Module) -> dict[int, SimpleNamespace]:
    """What vLLM's layerwise reload notes of a model before its layers are processed, by module."""
    return {
        id(layer): SimpleNamespace(
            restore_metadata=({name: each.data.to("meta") for name, each in layer.named_parameters(recurse=False)}, {})
        )
        for layer in model.modules()
    }


def stubs(noted: dict[int, SimpleNamespace]) -> dict[str, dict[str, Any]]:
    """vLLM's modules that the writing of weights asks."""
    return {
        "vllm.model_executor.model_loader.reload.layerwise": {"get_layerwise_info": lambda layer: noted[id(layer)]},
        "vllm.model_executor.layers.vocab_parallel_embedding": {"VocabParallelEmbedding": VocabParallelEmbedding},
    }


def vllm_config() -> SimpleNamespace:
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        device_config=SimpleNamespace(device=torch.device("cpu")),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


def description(plan: LoadPlan) -> dict[str, Any]:
    """What vllm-ascend's configuration notes of this checkpoint's experts."""
    return EXPERT_KINDS[_format(plan, "model.layers.0.mlp.experts.0.up_proj.weight")].description


def cut(engine: EngineLayout, rank: int, folder: Path) -> Tensors:
    """A rank's tensors of a checkpoint."""
    _, tensors = full_weights(folder)
    dtypes = {holding.local: tensors[holding.tensor].dtype for holding in engine.holdings(rank)}
    own = _Own(engine.local_shapes(rank), dtypes)
    put(own, engine, rank, tensors)
    return own.tensors


class _Own:
    """What stands in a target for a rank: its tensors by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> None:
        self.tensors = {name: torch.zeros(shape, dtype=dtypes[name]) for name, shape in shapes.items()}

    def write(self, local: str) -> torch.Tensor:
        return self.tensors[local]

    def complete(self, local: str) -> None:
        """Nothing follows."""


def held(model: torch.nn.Module) -> Tensors:
    """Every tensor of a model's layers, by path."""
    return {
        f"{path}.{name}": tensor
        for path, layer in model.named_modules()
        for name, tensor in layer_tensors(layer).items()
        if "." not in name
    }
