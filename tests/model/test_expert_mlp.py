"""expert_mlp, by threads and by one call for all groups, against autograd on dense weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.model import grouped_experts
from qerl_rl.model.base_weight import Base, Unpacker
from qerl_rl.model.expert_mlp import expert_mlp
from qerl_rl.model.grouped_experts import grouped_expert_mlp
from qerl_rl.model.grouped_linear import Adapter
from qerl_rl.quant.formats import FORMATS, get_format

EXPERTS, HIDDEN, WIDTH, RANK, SCALING = 5, 64, 32, 4, 0.5
KINDS = ["float", *FORMATS]
Way = Callable[..., torch.Tensor]
WAYS = [pytest.param(expert_mlp, id="threads"), pytest.param(grouped_expert_mlp, id="one call")]


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _base(kind: str, weight: torch.Tensor) -> tuple[Base, torch.Tensor]:
    """The weight in this format, and the floats that it stands for."""
    if kind == "float":
        return Base((weight,)), weight
    format = get_format(kind, 32 if kind.startswith("w4") else 0)
    parts = format.quantize(weight)
    return Base(tuple(parts[part.suffix] for part in format.parts), format), format.dequantize(parts)


def _leaves(tokens: int) -> list[torch.Tensor]:
    """Tokens, probabilities, and A and B of both matrices."""
    leaves = [
        _random(tokens, HIDDEN, seed=1),
        _random(tokens, seed=2).sigmoid(),
        _random(EXPERTS, RANK, HIDDEN, seed=3),
        _random(EXPERTS, 2 * WIDTH, RANK, seed=4),
        _random(EXPERTS, RANK, WIDTH, seed=5),
        _random(EXPERTS, HIDDEN, RANK, seed=6),
    ]
    return [leaf.requires_grad_() for leaf in leaves]


def _oracle(leaves: list[torch.Tensor], w13: torch.Tensor, w2: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """The textbook's expert with merged adapters, differentiated by torch."""
    x, probabilities, a13, b13, a2, b2 = leaves
    w13, w2 = w13 + SCALING * b13 @ a13, w2 + SCALING * b2 @ a2
    outputs = []
    for group, (part, weights) in enumerate(zip(x.split(rows), probabilities.split(rows), strict=True)):
        gate, up = (part @ w13[group].t()).chunk(2, -1)
        outputs.append((F.silu(gate) * up * weights[:, None]) @ w2[group].t())
    return torch.cat(outputs)


def _compare(kind: str, rows: list[int], way: Way = expert_mlp) -> None:
    first, w13 = _base(kind, _random(EXPERTS, 2 * WIDTH, HIDDEN, seed=7) * 0.3)
    second, w2 = _base(kind, _random(EXPERTS, HIDDEN, WIDTH, seed=8) * 0.3)
    found, expected = _leaves(sum(rows)), _leaves(sum(rows))
    x, probabilities, a13, b13, a2, b2 = found
    adapters = Adapter(a13, b13, SCALING), Adapter(a2, b2, SCALING)
    y, oracle = way(x, probabilities, rows, (first, second), adapters), _oracle(expected, w13, w2, rows)
    gradient = _random(*y.shape, seed=9)
    y.backward(gradient)
    oracle.backward(gradient)
    for one, other in zip(
        (y, *(leaf.grad for leaf in found)), (oracle, *(leaf.grad for leaf in expected)), strict=True
    ):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3e-5 * float(other.abs().max()) if other.numel() else 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_all_gradients_equal_the_dense_oracle_with_idle_experts(kind: str, way: Way) -> None:
    _compare(kind, [0, 9, 5, 0, 7], way)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.lists(st.integers(0, 6), min_size=EXPERTS, max_size=EXPERTS),
)
def test_any_distribution_of_tokens_gives_the_oracles_gradients(kind: str, rows: list[int]) -> None:
    if any(rows):
        _compare(kind, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_token_every_gradient_is_zero(kind: str) -> None:
    bases = (
        _base(kind, _random(EXPERTS, 2 * WIDTH, HIDDEN, seed=7))[0],
        _base(kind, _random(EXPERTS, HIDDEN, WIDTH, seed=8))[0],
    )
    x, probabilities, a13, b13, a2, b2 = leaves = _leaves(0)
    adapters = Adapter(a13, b13, SCALING), Adapter(a2, b2, SCALING)
    expert_mlp(x, probabilities, [0] * EXPERTS, bases, adapters).sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()


STORED = {"w8a8": get_format("w8a8"), "w4a8, scales of rows": get_format("w4a8", -1), "w4a16": get_format("w4a16", 32)}
"""Formats that bfloat16 activations are multiplied with as they are stored."""


def _outputs_and_gradients(bases: tuple[Base, Base], rows: list[int]) -> list[torch.Tensor]:
    leaves = [leaf.detach().to(torch.bfloat16) for leaf in _leaves(sum(rows))]
    x, a13, b13, a2, b2 = (leaf.requires_grad_() for leaf in (leaves[0], *leaves[2:]))
    probabilities = leaves[1].float().requires_grad_()
    adapters = Adapter(a13, b13, SCALING), Adapter(a2, b2, SCALING)
    y = grouped_expert_mlp(x, probabilities, rows, bases, adapters)
    y.backward(_random(*y.shape, seed=9).to(torch.bfloat16))
    found = [y.detach(), *(leaf.grad for leaf in (x, probabilities, a13, b13, a2, b2))]
    assert all(tensor is not None for tensor in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("rows", [[0, 9, 5, 0, 7], [3, 0, 0, 0, 0]])
def test_products_with_stored_weights_are_bit_for_bit_those_with_their_floats(
    kind: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    format, bases = STORED[kind], []
    for seed, shape in ((7, (EXPERTS, 2 * WIDTH, HIDDEN)), (8, (EXPERTS, HIDDEN, WIDTH))):
        parts = format.quantize(_random(*shape, seed=seed) * 0.3)
        bases.append(Base(tuple(parts[part.suffix] for part in format.parts), format))
    unpacked: list[int] = []
    unpack = Unpacker.matrix
    monkeypatch.setattr(Unpacker, "matrix", lambda self, group: unpacked.append(group) or unpack(self, group))
    found = _outputs_and_gradients((bases[0], bases[1]), rows)
    # Floats are made of int4 only, and in backward: of the experts with rows, for both matrices.
    working = [group for group, count in enumerate(rows) if count]
    assert unpacked == (working * 2 if kind == "w4a16" else [])
    monkeypatch.setattr(grouped_experts, "_is_int8", lambda base, dtype: False)
    monkeypatch.setattr(grouped_experts, "_is_int4", lambda base, dtype: False)
    for one, other in zip(found, _outputs_and_gradients((bases[0], bases[1]), rows), strict=True):
        assert torch.equal(one, other)
