"""Adapters merged into the engine's weights at each swap, rounded again to the format that the engine computes in.

The clean base is read again from the checkpoint each time (its pages stay in the system's cache), so nothing adds up
over swaps and no second copy is kept. The new weights go the way that the first ones went, through the model's own
loader and the layer's packing, one layer at a time; vLLM's layerwise reload copies the outcome into the tensors that
the kernels hold already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import LoraConfig
from qerl_rl.quant.requantize import Survival, merged_bfloat16, merged_parts
from qerl_rl.quant.rounding import Rounding
from qerl_rl.rollout.adapters import LAYER
from qerl_rl.rollout.expert_path import ADAPTED_KERNEL, expert_kernel
from qerl_rl.rollout.load_plan import LoadPlan
from qerl_rl.rollout.merge_targets import Target, TargetFinder


class MergedAdapters:
    """The weights of one rank's model that adapters change.

    Args: model: as vLLM built it. plan: how it was loaded. world_size: ranks that share the model, by whatever split.
    """

    nbytes = 0
    """Bytes that adapters take beside the weights."""

    def __init__(
        self, model: torch.nn.Module, vllm_config: Any, plan: LoadPlan, lora: LoraConfig, seed: int, world_size: int
    ) -> None:
        self._model, self._config, self._lora, self._seed = model, vllm_config, lora, seed
        self._plan, self._finder = plan, TargetFinder(plan.reader)
        self._layers: list[tuple[torch.nn.Module, list[Target], float]] = []
        for path, module in model.named_modules():
            found = LAYER.search(path)
            if found:
                targets, is_local = self._targets(path, f"model.layers.{found[1]}", module)
                if targets:
                    self._layers.append((module, targets, 1.0 if is_local else 1.0 / world_size))
        if not self._layers:
            raise RuntimeError(
                "no layer of the engine's model takes an adapter: its module names are not those expected"
            )
        self.survival = Survival()
        """Of the last update: this rank's share of the sums over all ranks."""

    def _targets(self, path: str, layer: str, module: Any) -> tuple[list[Target], bool]:
        """What adapters change of a module, and whether no other rank has these weights."""
        kind, attention, experts = path.rpartition(".")[2], self._lora.attention, self._lora.experts
        if attention and path.endswith(("self_attn.qkv_proj", "self_attn.o_proj")):
            return self._finder.attention(layer, kind), False
        if self._lora.shared_experts and path.endswith(("shared_expert.gate_up_proj", "shared_expert.down_proj")):
            return self._finder.shared_expert(layer, kind), False
        if experts and path.endswith("experts.routed_experts"):
            if module.expert_map is None:
                return self._finder.experts(layer, list(range(module.local_num_experts))), False
            return self._finder.experts(layer, torch.nonzero(module.expert_map >= 0).flatten().tolist()), True
        return [], False

    @torch.no_grad()
    def update(self, tensors: Mapping[str, torch.Tensor], step: int) -> int:
        """Put base + adapters into the engine, rounded with the numbers of `step`; returns the bytes written.

        tensors: full adapters in the exchange format.
        Raises: ValueError when one is missing, unknown or of another shape; the weights stay as they are then.
        """
        self._check(tensors)
        rounding = Rounding(self._lora.merge_rounding == "stochastic", self._seed, step)
        self.survival = Survival()
        for module, targets, share in self._layers:
            survival = Survival()
            merged = list(self._merged(tensors, targets, rounding, survival))
            with _reloading(module, self._config):
                self._model.load_weights(iter(merged))
            self.survival.add(survival, share)
        return sum(tensor.nbytes for module, _, _ in self._layers for tensor in module.parameters())

    def _merged(
        self, tensors: Mapping[str, torch.Tensor], targets: list[Target], rounding: Rounding, survival: Survival
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the modules of `targets` under its name in the checkpoint, the weights merged."""
        scale = self._lora.alpha / self._lora.rank
        for target in targets:
            weight, (a, b) = f"{target.stem}.weight", target.factors(tensors, scale)
            format = self._plan.engine_format(weight)
            if format is None:
                # As it was loaded: on the grid already.
                base = self._plan.reader.weight(weight, torch.bfloat16)
                yield weight, merged_bfloat16(base, a, b, rounding, weight, survival)
            else:
                merged = merged_parts(format, self._plan.parts(weight), a, b, rounding, weight, survival)
                for suffix, tensor in format.stored(merged).items():
                    yield weight + suffix, tensor
            for name in self._finder.tensors[target.stem]:
                if name != weight:
                    yield name, self._plan.reader.get(name)

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        adapters = {target.adapter for _, targets, _ in self._layers for target in targets}
        expected = {f"{adapter}.{kind}" for adapter in adapters for kind in ("lora_A", "lora_B")}
        if tensors.keys() != expected:
            missing, unknown = sorted(expected - tensors.keys())[:3], sorted(tensors.keys() - expected)[:3]
            raise ValueError(f"adapters don't fit the engine: missing {missing or 'none'}, unknown {unknown or 'none'}")
        for _, targets, _ in self._layers:
            for target in targets:
                target.factors(tensors, 1.0)


def merges_adapters(model: torch.nn.Module, lora: LoraConfig) -> bool:
    """Whether lora.in_rollout means merging in this engine's model: `auto` does where no kernel takes an adapter.

    Raises: ConfigError for `adapter` where an expert kernel takes none.
    """
    if not (lora.attention or lora.experts or lora.shared_experts):
        return False
    layers = [layer for path, layer in model.named_modules() if path.endswith("experts.routed_experts")]
    refusing = {expert_kernel(layer) for layer in layers} - {ADAPTED_KERNEL} if lora.experts else set()
    if lora.in_rollout == "adapter" and refusing:
        raise ConfigError(
            f"lora.in_rollout=adapter, but this engine's expert kernel {min(refusing)} takes no adapter.",
            fix="set lora.in_rollout to auto or merge, or lora.experts to false",
        )
    return lora.in_rollout == "merge" or bool(lora.in_rollout == "auto" and refusing)


@contextlib.contextmanager
def _reloading(module: torch.nn.Module, vllm_config: Any) -> Iterator[None]:
    """Inside, the loaders of this module collect its tensors; once all are there it is packed anew, in place."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.utils.torch_utils import set_default_torch_dtype

    if hasattr(module.quant_method, "moe_kernel"):
        # With a kernel in place, unquantized experts would take their weights for packed already.
        module.quant_method.moe_kernel = None
    with set_current_vllm_config(vllm_config), set_default_torch_dtype(vllm_config.model_config.dtype):
        initialize_layerwise_reload(module)
        yield
        finalize_layerwise_reload(module, vllm_config.model_config)
