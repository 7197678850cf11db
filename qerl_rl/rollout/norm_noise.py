"""Adaptive quantization noise (QeRL, arXiv 2510.11696) on the engine's RMSNorm weights."""

from __future__ import annotations

import re

import torch

from qerl_rl.quant.noise import gaussian

NOISY = re.compile(r"\b(layers\.\d+\.(?:input|post_attention)_layernorm)$")


class NormNoise:
    """The layer norms of one rank's model: their clean weights, and noise on top of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._clean: dict[str, tuple[torch.nn.Module, torch.Tensor]] = {}
        for path, module in model.named_modules():
            found = NOISY.search(path)
            if found:
                self._clean[f"model.{found[1]}.weight"] = (module, module.weight.data)
        if not self._clean:
            raise RuntimeError("no layer norm found in the engine's model: its module names are not those expected")

    def set(self, sigma: float, seed: int, step: int) -> None:
        """Weights become clean + sigma * gaussian(seed, step, name); sigma 0 puts the clean tensors themselves back.

        Noisy weights are float32 (RMSNorm multiplies in the type of its weight then): in bfloat16 a sigma below 2e-3
        would be rounded away on weights about 1.
        """
        for name, (module, clean) in self._clean.items():
            if sigma == 0:
                module.weight.data = clean
            else:
                noise = torch.from_numpy(gaussian(seed, step, name, tuple(clean.shape)))
                module.weight.data = clean.float() + sigma * noise
