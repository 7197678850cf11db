"""Noise on a weight, from a counter-based generator."""

from __future__ import annotations

import numpy as np
import torch

from qerl_rl.platform.ops.checks import require


def add_noise(clean: torch.Tensor, seed: int, stream: int, step: int, sigma: float) -> torch.Tensor:
    """clean + sigma * `normal_numbers` in float32, on the device of `clean`.

    Drawn on the host (norms are short) and copied; on CUDA drawn by a Triton kernel, within 1e-5 * sigma of the host's.
    torch_npu has no counter-based generator.
    Args: clean: of any floating-point type; seed, stream, step: of `normal_numbers`.
    Raises: ValueError when `clean` is not of floats.
    """
    require(clean.is_floating_point(), "add_noise", "a weight of floats", clean=clean)
    if clean.device.type == "cuda":
        from qerl_rl.platform.triton_kernels import noise

        return noise.add_noise(clean, seed, stream, step, sigma)
    numbers = torch.from_numpy(normal_numbers(seed, stream, step, clean.numel())).view(clean.shape)
    return clean.float() + sigma * numbers.to(clean.device)


def normal_numbers(seed: int, stream: int, step: int, count: int) -> np.ndarray:
    """`count` standard normal numbers, float32; more of them begin with the fewer.

    Philox is keyed by seed and stream, of 64 bits each, and its counter starts at the step; Box-Muller turns each pair
    of its words into one number (numpy promises the same raw words in every version, but not the same normals).
    """
    bits = np.random.Philox(
        key=np.array([seed % 2**64, stream], dtype=np.uint64), counter=np.array([0, 0, 0, step], dtype=np.uint64)
    )
    words = bits.random_raw(2 * count).reshape(count, 2)
    # 53 bits make a float64 in [0, 1); one minus it is never 0, which log needs.
    uniform = (words >> np.uint64(11)) * 2.0**-53
    normal = np.sqrt(-2.0 * np.log1p(-uniform[:, 0])) * np.cos(2.0 * np.pi * uniform[:, 1])
    return normal.astype(np.float32)
