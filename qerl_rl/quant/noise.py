"""Adaptive quantization noise (QeRL, arXiv 2510.11696, section 3.3): how strong it is at a step, and its numbers.

The numbers are counter-based: element i depends on (seed, step, name, i) alone, so any process can draw them again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qerl_rl.config.schema import NoiseConfig
from qerl_rl.platform.ops import add_noise, normal_numbers

SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "exponential": lambda start, end, progress: start * (end / start) ** progress if start else 0.0,
    "linear": lambda start, end, progress: start + (end - start) * progress,
    "cosine": lambda start, end, progress: end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0,
    "logarithmic": lambda start, end, progress: start + (end - start) * math.log1p((math.e - 1.0) * progress),
    "constant": lambda start, end, progress: start,
}
"""noise.schedule -> sigma, from sigma_start, sigma_end and progress in [0, 1].

Section 4.2 of the paper compares the first four; it has a formula (eq. 8) for the exponential one only.
"""


def sigma_at(step: int, steps: int, noise: NoiseConfig) -> float:
    """Standard deviation of the noise at `step` (counted from 1) of a run of `steps`.

    The run is cut into K = noise.stages equal parts. Stage 0 has no noise; stage k >= 1 has what noise.schedule gives
    for progress (k - 1) / (K - 2), so stage 1 has sigma_start and stage K - 1 has sigma_end (with K = 2 the only noisy
    stage has sigma_start). 0.0 where the noise is disabled.
    Raises: ValueError for a step outside the run.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step {step} is outside a run of {steps} steps")
    stage = (step - 1) * noise.stages // steps
    if not noise.enabled or stage == 0:
        return 0.0
    progress = (stage - 1) / max(noise.stages - 2, 1)
    return SCHEDULES[noise.schedule](noise.sigma_start, noise.sigma_end, progress)


@dataclass(frozen=True)
class Noise:
    """The noise of one step: everything that its numbers follow from. sigma 0 is none."""

    sigma: float = 0.0
    seed: int = 0
    step: int = 0
    exempt_router: bool = False

    def on(self, name: str, clean: torch.Tensor) -> torch.Tensor:
        """The weight `name` with noise on it, float32: clean + sigma * gaussian(seed, step, name).

        With exempt_router, no element loses more than half of itself, so that `router_correction` stays finite.
        """
        exact = clean.float()
        noisy = add_noise(clean, self.seed, _stream(name), self.step, self.sigma)
        if self.exempt_router:
            noisy = torch.where(noisy.abs() < exact.abs() / 2, exact, noisy)
        return noisy

    def router_correction(self, noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """What takes the noise out of a router's input: float32 clean / noisy, 1 where both are 0."""
        exact = clean.float()
        return torch.where(noisy == 0, torch.ones_like(exact), exact / noisy)


def gaussian(seed: int, step: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of `Noise.on`: numpy float32 of `shape`; a longer shape begins with the numbers of a shorter one."""
    return normal_numbers(seed, _stream(name), step, math.prod(shape)).reshape(shape)


def _stream(name: str) -> int:
    """The 64 bits that a parameter's name stands for."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
