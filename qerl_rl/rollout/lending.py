"""What of the engine's weights another engine of the process may read in place, so that they are stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from qerl_rl.layout.stored_experts import StoredExperts
from qerl_rl.rollout.adapters import LAYER
from qerl_rl.rollout.expert_path import ADAPTED_KERNEL, expert_kernel
from qerl_rl.rollout.packed_experts import PackedW8A8, int8_tiles

EXPERTS = "experts.routed_experts"
"""What the path of a layer of vLLM's experts ends with."""


class Lending:
    """What one rank's engine lends of its weights.

    Args: model: vLLM's, loaded. writes_weights: whether the engine changes them later, so that nothing can be lent.
    """

    def __init__(self, model: torch.nn.Module, *, writes_weights: bool) -> None:
        self._model, self._writes_weights = model, writes_weights
        self._lent: dict[str, int] = {}

    def experts(self) -> list[StoredExperts]:
        """The expert weights that are as the checkpoint has them, but for the order that a kernel wants.

        Empty where kernels keep them in a form that is not read here.
        """
        found: list[StoredExperts] = []
        for path, layer in self._model.named_modules() if not self._writes_weights else ():
            number = LAYER.search(path)
            if number and path.endswith(EXPERTS) and _is_read(layer):
                found += _of_layer(layer, f"model.layers.{number[1]}.mlp.experts")
        return found

    def lend(self, nbytes: Mapping[str, int]) -> None:
        """Count these weights as lent, with what each spares its readers; several may read one."""
        self._lent |= {name: max(count, self._lent.get(name, 0)) for name, count in nbytes.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that readers would have to store themselves."""
        return sum(self._lent.values())

    def storages(self) -> set[int]:
        """Addresses of the storages that are lent: they are never written and never leave memory."""
        lent = [stored for stored in self.experts() if stored.name in self._lent]
        return {tensor.untyped_storage().data_ptr() for stored in lent for tensor in stored.tensors}


def _is_read(layer: Any) -> bool:
    """Whether `packed_experts` knows the order of the layer's kernel; some platforms have none to ask."""
    return getattr(layer.quant_method, "moe_kernel", None) is not None and expert_kernel(layer) == ADAPTED_KERNEL


def _of_layer(layer: Any, prefix: str) -> Iterator[StoredExperts]:
    experts = _numbers(layer)
    if experts is None:
        return
    parallel = layer.moe_config.moe_parallel_config
    share = (parallel.tp_rank, parallel.tp_size)
    for name in ("w13", "w2"):
        weight, scale = getattr(layer, f"{name}_weight"), getattr(layer, f"{name}_weight_scale")
        yield StoredExperts(f"{prefix}.{name}", experts, share, PackedW8A8(), (int8_tiles(weight), scale.detach()))


def _numbers(layer: Any) -> range | None:
    """The model's numbers of the experts of this rank in the order of their weights; None where they have gaps."""
    if layer.expert_map is None:
        return range(layer.local_num_experts)
    own = torch.nonzero(layer.expert_map >= 0).flatten()
    places = layer.expert_map[own]
    run = torch.arange(len(own))
    first = int(own[0])
    return range(first, first + len(own)) if torch.equal(places.long(), run) and torch.equal(own - first, run) else None
