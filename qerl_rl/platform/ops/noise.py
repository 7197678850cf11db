"""Noise on a weight."""

from __future__ import annotations

import numpy as np
import torch

from qerl_rl.platform.ops.checks import require


def add_noise(clean: torch.Tensor, numbers: np.ndarray, sigma: float) -> torch.Tensor:
    """clean + sigma * numbers in float32, on the device of `clean`.

    torch_npu has no counter-based generator of Gaussian numbers, and the engine's must be the trainer's bit for bit, so
    they are drawn on the host (norms are short) and only copied: the same two torch operators on every device.
    Args: clean of any floating-point type; numbers float32 of its shape.
    Raises: ValueError when the shapes differ.
    """
    fits = tuple(clean.shape) == numbers.shape and numbers.dtype == np.float32 and clean.is_floating_point()
    require(fits, "add_noise", "float32 numbers of the weight's shape", clean=clean, numbers=torch.from_numpy(numbers))
    return clean.float() + sigma * torch.from_numpy(numbers).to(clean.device)
