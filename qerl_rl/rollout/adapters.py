"""LoRA adapters beside the engine's frozen int8 layers: this rank's slices of them, updated in place.

The tensors are float32: small float32 products take a tenth of the time of bfloat16 ones on CPU, and an update never
falls below a rounding step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.config.schema import LoraConfig
from qerl_rl.rollout.expert_path import attach_expert_path

LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Adapter:
    """This rank's part of one adapter: y += (x A^T) B^T, with the scale (alpha / rank) inside B.

    a: float32 [..., rank, inputs], b: float32 [..., outputs, rank]; an expert layer has its local experts in front.
    experts, inputs, outputs: which experts, columns of A and rows of B of the full tensors these are; None takes all.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor
    experts: torch.Tensor | None = None
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def copy_(self, full_a: torch.Tensor, full_b: torch.Tensor, scale: float) -> int:
        """Take over this rank's slices of the full tensors; returns their bytes."""
        for part, full, dim, index in ((self.a, full_a, -1, self.inputs), (self.b, full_b, -2, self.outputs)):
            local = full if self.experts is None else full[self.experts]
            local = local if index is None else local.index_select(dim, index)
            if local.shape != part.shape:
                raise ValueError(
                    f"adapter {self.name}: {tuple(full.shape)} doesn't fit, this rank needs {tuple(part.shape)}"
                )
            part.copy_(local)
        self.b.mul_(scale)
        return self.nbytes

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class AdapterSet:
    """All adapters of one rank of the engine, zero (no effect) until the first `update`."""

    def __init__(self, model: torch.nn.Module, lora: LoraConfig) -> None:
        self.scale = lora.alpha / lora.rank
        self.adapters: list[Adapter] = []
        for path, module in model.named_modules():
            layer = LAYER.search(path)
            if layer is None:
                continue
            prefix = f"model.layers.{layer[1]}"
            if lora.attention and path.endswith("self_attn.qkv_proj"):
                self._attach_linear(module, _qkv_adapter(module, f"{prefix}.self_attn.qkv_proj", lora.rank))
            elif lora.attention and path.endswith("self_attn.o_proj"):
                self._attach_linear(module, _row_adapter(module, f"{prefix}.self_attn.o_proj", lora.rank))
            elif lora.shared_experts and path.endswith("mlp.shared_expert.gate_up_proj"):
                name = f"{prefix}.mlp.shared_expert.gate_up_proj"
                self._attach_linear(module, _gate_up_adapter(module, name, lora.rank))
            elif lora.shared_experts and path.endswith("mlp.shared_expert.down_proj"):
                name = f"{prefix}.mlp.shared_expert.down_proj"
                self._attach_linear(module, _row_adapter(module, name, lora.rank))
            elif lora.experts and path.endswith("experts.routed_experts"):
                gate_up, down = _expert_adapters(module, f"{prefix}.mlp.experts", lora.rank)
                attach_expert_path(module, gate_up.a, gate_up.b, down.a, down.b)
                self.adapters += [gate_up, down]
        if not self.adapters:
            raise RuntimeError(
                "no layer of the engine's model takes an adapter: its module names are not those expected"
            )

    def _attach_linear(self, module: Any, adapter: Adapter) -> None:
        module.quant_method = _LinearWithAdapter(module.quant_method, adapter.a, adapter.b)
        self.adapters.append(adapter)

    def update(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Take over full tensors in the exchange format; returns the bytes of this rank's slices.

        Raises: ValueError when a tensor is missing, unknown or of another shape; some adapters may be updated then.
        """
        expected = {f"{adapter.name}.{kind}" for adapter in self.adapters for kind in ("lora_A", "lora_B")}
        if tensors.keys() != expected:
            missing, unknown = sorted(expected - tensors.keys())[:3], sorted(tensors.keys() - expected)[:3]
            raise ValueError(f"adapters don't fit the engine: missing {missing or 'none'}, unknown {unknown or 'none'}")
        return sum(
            adapter.copy_(tensors[f"{adapter.name}.lora_A"], tensors[f"{adapter.name}.lora_B"], self.scale)
            for adapter in self.adapters
        )

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters)


class _LinearWithAdapter:
    """A linear layer's quant method whose output has the adapter's added, before any reduction over ranks."""

    def __init__(self, base: Any, a: torch.Tensor, b: torch.Tensor) -> None:
        self.base, self.a, self.b = base, a, b

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = self.base.apply(layer, x, bias)
        return output.add_(torch.mm(torch.mm(x.float(), self.a.t()), self.b.t()))


def _qkv_adapter(layer: Any, name: str, rank: int) -> Adapter:
    """Column parallel: every rank has all of A, and the rows of B of its own query and key-value heads."""
    size = layer.head_size
    query_rows, kv_rows = layer.num_heads * size, layer.num_kv_heads * size
    all_queries, all_kv = layer.total_num_heads * size, layer.total_num_kv_heads * size
    # With fewer key-value heads than ranks, neighbouring ranks hold the same head.
    kv_start = layer.tp_rank // layer.num_kv_head_replicas * kv_rows
    starts = (layer.tp_rank * query_rows, all_queries + kv_start, all_queries + all_kv + kv_start)
    outputs = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, (query_rows, kv_rows, kv_rows), strict=True)])
    return Adapter(name, torch.zeros(rank, layer.input_size), torch.zeros(len(outputs), rank), outputs=outputs)


def _gate_up_adapter(layer: Any, name: str, rank: int) -> Adapter:
    """Column parallel: all of A, and of B the rows of this rank's part of gate and of up."""
    width = layer.output_size_per_partition // 2
    part = torch.arange(layer.tp_rank * width, (layer.tp_rank + 1) * width)
    outputs = torch.cat([part, layer.output_size // 2 + part])
    return Adapter(name, torch.zeros(rank, layer.input_size), torch.zeros(2 * width, rank), outputs=outputs)


def _row_adapter(layer: Any, name: str, rank: int) -> Adapter:
    """Row parallel: the columns of A of this rank's inputs; the layer, or what follows it, sums partial outputs."""
    width = layer.input_size_per_partition
    inputs = torch.arange(layer.tp_rank * width, (layer.tp_rank + 1) * width)
    return Adapter(name, torch.zeros(rank, width), torch.zeros(layer.output_size, rank), inputs=inputs)


def _expert_adapters(layer: Any, name: str, rank: int) -> tuple[Adapter, Adapter]:
    """The adapters of this rank's experts, or of its share of every expert's intermediate size."""
    parallel = layer.moe_config.moe_parallel_config
    hidden, width = layer.hidden_size, layer.intermediate_size_per_partition
    if layer.expert_map is None:
        experts = torch.arange(layer.local_num_experts)
    else:
        experts = torch.nonzero(layer.expert_map >= 0).flatten()
        experts = experts[layer.expert_map[experts].argsort()]
    columns = torch.arange(parallel.tp_rank * width, (parallel.tp_rank + 1) * width)
    rows = torch.cat([columns, width * parallel.tp_size + columns])
    gate_up = Adapter(
        f"{name}.w13",
        torch.zeros(len(experts), rank, hidden),
        torch.zeros(len(experts), 2 * width, rank),
        experts=experts,
        outputs=rows,
    )
    down = Adapter(
        f"{name}.w2",
        torch.zeros(len(experts), rank, width),
        torch.zeros(len(experts), hidden, rank),
        experts=experts,
        inputs=columns,
    )
    return gate_up, down
