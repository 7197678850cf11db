"""The fused operators on a simulated NPU, forward and backward, through the real torch_npu and its own autograd.

Not proven here: numerics of the kernels, NZ formats, limits of kernels, speed.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.platform.npu.cases import CASES, HIDDEN
from tests.platform.npu.program import run_program

pytestmark = pytest.mark.ascend

ROUNDED = ("rms_norm, noisy weight", "grouped_matmul_int", "stored experts", "dynamic_quantize")
"""Cases with numbers of 16 bits in them; all others are float32 throughout."""


@pytest.fixture(scope="module")
def differences() -> dict[str, Any]:
    """Of each case, by result and gradient: the largest difference from the reference, by the largest element."""
    return run_program("tests.npu_sim.fused_operators")


@pytest.mark.parametrize("name", CASES)
def test_operator_and_gradients_are_the_references(differences: dict[str, Any], name: str) -> None:
    # A rounding for each part of the longest sum; with 16 bits three of 2^-8: an intermediate of either, the result.
    bound = 3 * 2**-8 if name.startswith(ROUNDED) else HIDDEN * 2**-24
    found = differences[name]
    assert isinstance(found, list), found
    assert [each for each in found if isinstance(each, str) or each > bound] == []
