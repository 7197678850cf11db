"""The Triton kernels in Triton's interpreter, against the references."""

from __future__ import annotations

import os
import traceback

import numpy as np
import pytest
import torch

from qerl_rl.platform.ops import gating_top_k_softmax, normal_numbers
from tests.platform.triton_kernels import int4_cases
from tests.ranks import run_ranks

NOISES = [(0, 1, 1, (1,)), (7, 2**63 + 5, 3, (33, 65)), (2**64 - 1, 2**64 - 3, 10**6, (5000,)), (-4, 12, 2, (1024,))]
SIGMA = 0.01
GATES = [(5, 8, 2), (3, 60, 4), (1, 1, 1), (0, 8, 2), (4, 128, 8)]


def _logits(tokens: int, experts: int) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)) * 3


Found = tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]], dict[str, str]]


def _interpreted() -> Found:
    """What the kernels give for NOISES (on weights of zeros and of one), and for GATES and equal logits; which of the
    cases with int4 fail, and how."""
    # Triton reads it when a kernel is declared.
    os.environ["TRITON_INTERPRET"] = "1"
    from qerl_rl.platform.triton_kernels import gating, noise

    noises = [noise.add_noise(torch.zeros(shape), *key, 1.0) for *key, shape in NOISES]
    noises.append(noise.add_noise(torch.ones(6, 5, dtype=torch.bfloat16).t(), 7, 5, 3, SIGMA))
    gates = [gating.gating_top_k_softmax(_logits(tokens, experts), k) for tokens, experts, k in GATES]
    gates.append(gating.gating_top_k_softmax(torch.zeros(2, 6, dtype=torch.bfloat16), 3))
    failures = {}
    for name, check in int4_cases.CASES.items():
        try:
            check()
        except Exception:  # noqa: BLE001 - the test of this case shows it, and the others go on
            failures[name] = traceback.format_exc()
    return noises, gates, failures


@pytest.fixture(scope="module")
def interpreted() -> Found:
    return run_ranks(_interpreted, 1)[0]


@pytest.mark.parametrize("number", range(len(NOISES)))
def test_noise_is_that_of_the_host_up_to_float32(interpreted: tuple, number: int) -> None:
    seed, stream, step, shape = NOISES[number]
    found = interpreted[0][number]
    expected = normal_numbers(seed, stream, step, int(np.prod(shape))).reshape(shape)
    # The angle is rounded when it becomes a float (2^-25 of a turn) and when it is multiplied (2^-24). The radius,
    # below 9, is off by a relative 2^-22: where the logarithm takes over from its series, at 2^-6, by 2^-25.
    assert np.abs(found.numpy() - expected).max() < 9 * (2 * np.pi * 1.5 * 2**-24 + 2**-22)


def test_noise_is_added_to_the_weight_it_is_given(interpreted: tuple) -> None:
    found = interpreted[0][-1]
    expected = 1.0 + SIGMA * normal_numbers(7, 5, 3, 30).reshape(5, 6)
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() < SIGMA * 1e-5 + 2**-23


@pytest.mark.parametrize("number", range(len(GATES)))
def test_gating_is_that_of_the_reference(interpreted: tuple, number: int) -> None:
    tokens, experts, k = GATES[number]
    values, chosen = interpreted[1][number]
    expected, indices = gating_top_k_softmax(_logits(tokens, experts), k)
    assert torch.equal(chosen, indices)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_of_equal_experts_the_first_are_chosen(interpreted: tuple) -> None:
    values, chosen = interpreted[1][-1]
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert values.dtype == torch.bfloat16


@pytest.mark.parametrize("name", int4_cases.CASES)
def test_int4_kernels_do_what_the_references_do(interpreted: tuple, name: str) -> None:
    assert interpreted[2].get(name) is None, interpreted[2][name]
