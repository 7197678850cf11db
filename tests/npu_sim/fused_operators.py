"""Every case of the fused operators on the simulated NPU and on the CPU; prints how far apart they are.

Run as a program by `program.run_program`. Not proven: numerics of the kernels, NZ formats, limits of
kernels, speed.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch

from qerl_rl.platform import simulated_npu
from tests.platform.npu.cases import CASES, Case, Tensors, computed


def _difference(found: torch.Tensor | None, expected: torch.Tensor | None) -> str | float:
    """The largest difference, as a share of the largest element; or what else differs."""
    if found is None or expected is None:
        return "no gradient"
    found, expected = found.detach().cpu(), expected.detach()
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return f"{found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if not found.isfinite().all():
        return "not finite"
    largest = float(expected.double().abs().max())
    return float((found.double() - expected.double()).abs().max()) / (largest or 1.0)


def _differences(case: Case) -> Any:
    expected = computed(case, Tensors("cpu", torch.float32, seed=1))
    try:
        found = computed(case, Tensors("npu", torch.float32, seed=1))
    except Exception as error:  # noqa: BLE001 - the test of this case shows it, and the others go on
        return f"{type(error).__name__}: {error}"
    return [_difference(one, other) for one, other in zip(found, expected, strict=True)]


def main() -> None:
    warnings.filterwarnings("ignore")
    simulated_npu.start()
    print(json.dumps({name: _differences(case) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
