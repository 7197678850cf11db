"""The engine's noise on the trainer's RMSNorm weights, to evaluate what sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qerl_rl.quant.noise import Noise


@contextmanager
def noisy_norms(model: torch.nn.Module, noise: Noise) -> Iterator[None]:
    """Inside, the layer norms of this rank's GPTModel have `noise` on them, number for number that of the engine."""
    with ExitStack() as stack:
        for layer in model.decoder.layers if noise.sigma else ():
            prefix = f"model.layers.{layer.layer_number - 1}"
            router = getattr(layer.mlp, "router", None)  # A dense layer has none.
            _add(stack, noise, f"{prefix}.input_layernorm.weight", layer.input_layernorm)
            _add(stack, noise, f"{prefix}.post_attention_layernorm.weight", layer.pre_mlp_layernorm, router)
        yield


def _add(
    stack: ExitStack, noise: Noise, name: str, norm: torch.nn.Module, router: torch.nn.Module | None = None
) -> None:
    clean = norm.weight.data
    noisy = noise.on(name, clean)
    norm.weight.data = noisy
    stack.callback(setattr, norm.weight, "data", clean)
    if router is not None and noise.exempt_router:
        hook = router.register_forward_pre_hook(_scaled_input(noise.router_correction(noisy, clean)))
        stack.callback(hook.remove)


def _scaled_input(factors: torch.Tensor) -> Any:
    """A hook that multiplies a module's first argument [..., H] by `factors` [H], in float32."""

    def scale(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        return ((hidden * factors).to(hidden.dtype), *others)

    return scale
