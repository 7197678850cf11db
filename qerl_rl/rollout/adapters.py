"""LoRA adapters beside the engine's frozen int8 layers: this rank's slices of them, updated in place.

The tensors are float32: small float32 products take a tenth of the time of bfloat16 ones on CPU, and an update never
falls below a rounding step. They are never replaced, so that captured graphs see every update. (Experts on a CPU
compute with copies in another order, made anew after each update, on AMX tiles rounded to bfloat16.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.config.schema import LoraConfig
from qerl_rl.rollout.expert_path import attach_expert_path
from qerl_rl.rollout.repack import packed_modules

LAYER = re.compile(r"\blayers\.(\d+)\.")
ROW_PARALLEL = ("o_proj", "down_proj")
FUSED_DOWN, DOWN_PROJECTIONS = "fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")
"""vLLM keeps both down projections of latent attention in one layer; each has an adapter of its own."""


def adapted_linears(lora: LoraConfig) -> tuple[str, ...]:
    """vLLM's linear layers inside a decoder layer that have adapters, of all families."""
    found: list[str] = []
    if lora.attention:
        names = ("qkv_proj", "q_proj", "q_b_proj", "kv_a_proj_with_mqa", FUSED_DOWN, "o_proj")
        found += [f"self_attn.{name}" for name in names]
    if lora.shared_experts:
        for parent in ("mlp.shared_expert", "mlp.shared_experts", "mlp"):
            found += [f"{parent}.gate_up_proj", f"{parent}.down_proj"]
    return tuple(found)


@dataclass(frozen=True)
class Adapter:
    """This rank's part of one adapter: y += (x A^T) B^T, with the scale (alpha / rank) inside B.

    a: float32 [..., rank, inputs], b: float32 [..., outputs, rank]; an expert layer has its local experts in front.
    """

    name: str
    a: torch.Tensor
    b: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class AdapterSet:
    """All adapters of one rank of the engine, zero (no effect) until the first `update`."""

    def __init__(self, model: torch.nn.Module, lora: LoraConfig) -> None:
        self.scale = lora.alpha / lora.rank
        self.adapters: list[Adapter] = []
        self._after_update: list[Callable[[], None]] = []
        for path, module in packed_modules(model).items():
            layer = LAYER.search(path)
            if layer is None:
                continue
            prefix = f"model.layers.{layer[1]}"
            place = path[layer.end() :]
            if place in adapted_linears(lora):
                self._attach_linear(module, f"{prefix}.{place}", lora.rank)
            elif lora.experts and path.endswith(".experts"):
                gate_up, down = _expert_adapters(module, f"{prefix}.mlp.experts", lora.rank)
                self._after_update.append(attach_expert_path(module, gate_up.a, gate_up.b, down.a, down.b))
                self.adapters += [gate_up, down]
        if not self.adapters:
            raise RuntimeError(
                "no layer of the engine's model takes an adapter: its module names are not those expected"
            )
        self._tensors = {f"{adapter.name}.lora_A": adapter.a for adapter in self.adapters}
        self._tensors |= {f"{adapter.name}.lora_B": adapter.b for adapter in self.adapters}
        self._missing: set[str] = set()

    def _attach_linear(self, module: Any, name: str, rank: int) -> None:
        """One adapter on all outputs of a layer, or one on each of the projections that are fused in it."""
        parent, _, leaf = name.rpartition(".")
        if leaf in ROW_PARALLEL:
            own = [(_row_adapter(module, name, rank), slice(None))]
        elif leaf == FUSED_DOWN:
            own, first = [], 0
            for projection, rows in zip(DOWN_PROJECTIONS, module.output_sizes, strict=True):
                own.append((_column_adapter(module, f"{parent}.{projection}", rank, rows), slice(first, first + rows)))
                first += rows
        else:
            own = [(_column_adapter(module, name, rank, sum(module.output_partition_sizes)), slice(None))]
        for adapter, outputs in own:
            module.quant_method = _LinearWithAdapter(module.quant_method, adapter.a, adapter.b, outputs)
            if getattr(module, "custom_op", None) is not None:
                # vllm-ascend's linear layers with a communication of their own keep the method a second time.
                module.custom_op.quant_method = module.quant_method
            self.adapters.append(adapter)

    def begin(self, step: int) -> None:
        """An update begins. step has no effect: nothing is rounded here."""
        self._missing = {f"{adapter.name}.{kind}" for adapter in self.adapters for kind in ("lora_A", "lora_B")}

    @property
    def locals(self) -> dict[str, tuple[int, ...]]:
        """By name, the shape of what this rank holds of each adapter's tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def write(self, local: str) -> torch.Tensor:
        """The tensor to fill. Raises: KeyError when the engine holds none of this name."""
        return self._tensors[local]

    def complete(self, local: str) -> None:
        """All of it has been written, without the scale."""
        if local.endswith(".lora_B") and local in self._missing:
            self._tensors[local].mul_(self.scale)
        self._missing.discard(local)

    def finish(self) -> int:
        """The end of an update: returns the bytes written. Raises: RuntimeError when tensors are missing."""
        check_complete(self._missing)
        for written in self._after_update:
            written()
        return self.nbytes

    @property
    def nbytes(self) -> int:
        return sum(adapter.nbytes for adapter in self.adapters)


def check_complete(missing: Collection[str]) -> None:
    """Raise RuntimeError when an update has ended before these tensors of the engine were complete."""
    if missing:
        raise RuntimeError(
            f"{len(missing)} tensors of the engine were never completed, {min(missing)} among them: the plan of the "
            "transfer must hold every tensor of the engine's layout"
        )


class _LinearWithAdapter:
    """A linear layer's quant method whose output has the adapter's added, before any reduction over ranks."""

    def __init__(self, base: Any, a: torch.Tensor, b: torch.Tensor, outputs: slice) -> None:
        self.base, self.a, self.b, self.outputs = base, a, b, outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output = self.base.apply(layer, x, bias)
        output[..., self.outputs].add_(torch.mm(torch.mm(x.float(), self.a.t()), self.b.t()))
        return output


def _column_adapter(layer: Any, name: str, rank: int, rows: int) -> Adapter:
    """Column parallel or on every rank: all of A, and of B the rows of this rank's outputs."""
    return _zeros(layer, name, (rank, layer.input_size), (rows, rank))


def _row_adapter(layer: Any, name: str, rank: int) -> Adapter:
    """Row parallel: the columns of A of this rank's inputs; the layer, or what follows it, sums partial outputs."""
    width = layer.input_size_per_partition
    return _zeros(layer, name, (rank, width), (layer.output_size, rank))


def _expert_adapters(layer: Any, name: str, rank: int) -> tuple[Adapter, Adapter]:
    """The adapters of this rank's experts, or of its share of every expert's intermediate size."""
    hidden, width, experts = layer.hidden_size, layer.intermediate_size_per_partition, layer.local_num_experts
    gate_up = _zeros(layer, f"{name}.w13", (experts, rank, hidden), (experts, 2 * width, rank))
    return gate_up, _zeros(layer, f"{name}.w2", (experts, rank, width), (experts, hidden, rank))


def _zeros(layer: Any, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> Adapter:
    """On the device of the layer."""
    device = next(layer.parameters()).device
    return Adapter(name, torch.zeros(a, device=device), torch.zeros(b, device=device))
