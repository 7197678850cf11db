"""Adaptive quantization noise (QeRL, arXiv 2510.11696) on the engine's RMSNorm weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.quant.noise import Noise

NOISY = re.compile(r"\b(layers\.\d+\.(?:input|post_attention)_layernorm)$")
ROUTERS = ("mlp.gate", "block_sparse_moe.gate")
"""Where a layer has its router, by family."""


@dataclass
class _Norm:
    """A layer norm, its clean weight, and the router that sees what it puts out, if it comes before one."""

    module: torch.nn.Module
    clean: torch.Tensor
    router: torch.nn.Module | None


class NormNoise:
    """The layer norms of one rank's model: their clean weights, and noise on top of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = dict(model.named_modules())
        self._norms: dict[str, _Norm] = {}
        self._exempt: list[torch.nn.Module] = []
        for path, module in modules.items():
            found = NOISY.search(path)
            if found:
                layer, _, kind = path.rpartition(".")
                routers = [modules[f"{layer}.{name}"] for name in ROUTERS if f"{layer}.{name}" in modules]
                router = routers[0] if routers and kind == "post_attention_layernorm" else None
                self._norms[f"model.{found[1]}.weight"] = _Norm(module, module.weight.data, router)
        if not self._norms:
            raise RuntimeError("no layer norm found in the engine's model: its module names are not those expected")

    def set(self, noise: Noise) -> None:
        """Weights become clean ones with `noise`; sigma 0 puts the clean tensors themselves back.

        Noisy weights are float32 (RMSNorm multiplies in the type of its weight then): in bfloat16 a sigma below 2e-3
        would be rounded away on weights about 1.
        Raises: RuntimeError when routers shall be exempt from the noise and none is found.
        """
        for router in self._exempt:
            router.quant_method = router.quant_method.base
        self._exempt = []
        for name, norm in self._norms.items():
            norm.module.weight.data = noise.on(name, norm.clean) if noise.sigma else norm.clean
            if noise.sigma and noise.exempt_router and norm.router is not None:
                correction = noise.router_correction(norm.module.weight.data, norm.clean)
                norm.router.quant_method = _NoiseFreeRouter(norm.router, correction)
                self._exempt.append(norm.router)
        if noise.sigma and noise.exempt_router and not self._exempt:
            raise RuntimeError("no router found in the engine's model: its module names are not those expected")


class _NoiseFreeRouter:
    """A router's quant method that takes the noise out of its input: its weight's columns are multiplied by `factors`,
    in float32."""

    def __init__(self, router: Any, factors: torch.Tensor) -> None:
        self.base = router.quant_method
        # Rows of experts, contiguous: with the transposed matrix a CPU's product takes up to twice as long.
        self._weight = torch.mul(_transposed_weight(router).t(), factors).contiguous()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        logits = torch.nn.functional.linear(x.float(), self._weight)
        return (logits if bias is None else logits + bias).to(x.dtype)


def _transposed_weight(router: Any) -> torch.Tensor:
    """float32 [hidden, experts], exactly the router's numbers.

    A CPU layer has handed its weight to a kernel that shows it no more, so it is asked for its answers to unit vectors.
    """
    if router.weight.numel():
        return router.weight.t().float()
    dtype, rows = router.weight.dtype, torch.arange(router.input_size).split(512)
    units = (torch.nn.functional.one_hot(some, router.input_size).to(dtype) for some in rows)
    return torch.cat([router.quant_method.apply(router, unit).float() for unit in units])
