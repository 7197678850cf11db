"""The int4 kernels in Triton's interpreter against the references, over many shapes; to run where it is switched on."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_rl.platform import ops

SEVERAL = settings(deadline=None, derandomize=True, max_examples=8, database=None)
EIGHTS = st.integers(1, 18).map(lambda eighths: 8 * eighths)
"""Widths that fill no block of 64 or 128, some."""


def random_matrices(
    experts: int, inputs: int, outputs: int, group: int, *, seed: int, dtype: torch.dtype, with_offset: bool
) -> ops.Int4Matrices:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(1 << 31), 1 << 31, (experts, inputs, outputs // 8), generator=generator).int()
    shape = (experts, inputs // group, outputs)
    scale = (torch.rand(shape, generator=generator) * 0.02).to(dtype)
    offset = torch.randint(-3, 4, shape, generator=generator).to(dtype) if with_offset else None
    return ops.Int4Matrices(packed, scale, offset)


def compare_experts(
    chosen: torch.Tensor,
    hidden: int,
    width: int,
    groups: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    with_offset: bool = False,
) -> None:
    """Raises AssertionError unless kernel and reference agree up to the rounding of their sums."""
    from qerl_rl.platform.triton_kernels import int4

    experts = max(int(chosen.max()) + 1, 1) if chosen.numel() else 1
    generator = torch.Generator().manual_seed(hidden + width)
    x = torch.randn(len(chosen), hidden, generator=generator).to(dtype)
    probabilities = torch.rand(chosen.shape, generator=generator)
    gate_up = random_matrices(experts, hidden, 2 * width, groups[0], seed=1, dtype=dtype, with_offset=with_offset)
    down = random_matrices(experts, width, hidden, groups[1], seed=2, dtype=dtype, with_offset=with_offset)
    found = int4.decode_experts_int4(x, chosen, probabilities, gate_up, down)
    expected = ops.decode_experts_int4(x, chosen, probabilities, gate_up, down)
    assert found.dtype == dtype
    # Two sums of up to `hidden` and `width` float32 numbers in another order, and a rounding to the type.
    bound = (hidden + width) * 2**-24 + (2**-8 if dtype == torch.bfloat16 else 0.0)
    largest = float(expected.float().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=bound * largest)


@SEVERAL
@given(experts=st.integers(0, 3), outputs=EIGHTS, words=st.integers(1, 40), seed=st.integers(0, 99))
def repacked_words_are_the_references(experts: int, outputs: int, words: int, seed: int) -> None:
    from qerl_rl.platform.triton_kernels import int4

    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(1 << 31), 1 << 31, (experts, outputs, words), generator=generator).int()
    assert torch.equal(int4.repack_int4(packed), ops.repack_int4(packed))


@SEVERAL
@given(
    chosen=st.lists(st.lists(st.integers(-1, 4), min_size=2, max_size=2), min_size=1, max_size=3),
    hidden=EIGHTS,
    width=EIGHTS,
    with_offset=st.booleans(),
)
def any_choice_of_experts_and_any_width_give_the_reference(
    chosen: list[list[int]], hidden: int, width: int, with_offset: bool
) -> None:
    # A scale for each whole column: of any length.
    compare_experts(torch.tensor(chosen), hidden, width, (hidden, width), with_offset=with_offset)


@SEVERAL
@given(groups=st.tuples(*[st.sampled_from([8, 24, 32, 64, 128])] * 2), counts=st.tuples(*[st.integers(1, 2)] * 2))
def any_two_group_sizes_give_the_reference(groups: tuple[int, int], counts: tuple[int, int]) -> None:
    hidden, width = (group * count for group, count in zip(groups, counts, strict=True))
    compare_experts(torch.tensor([[1, 0], [1, 1]]), hidden, width, groups)


def eight_tokens_of_eight_experts_in_bfloat16_give_the_reference() -> None:
    chosen = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(row))[:8] for row in range(8)])
    compare_experts(chosen, 64, 32, (32, 32), torch.bfloat16, with_offset=True)


def nobody_and_nothing_chosen_give_zeros_and_nothing() -> None:
    compare_experts(torch.full((2, 3), -1), 16, 8, (16, 8))
    compare_experts(torch.zeros(0, 2, dtype=torch.int64), 16, 8, (16, 8))


def experts_that_nobody_chose_are_not_read() -> None:
    from qerl_rl.platform.triton_kernels import int4

    gate_up, down = (
        random_matrices(3, 16, outputs, 16, seed=1, dtype=torch.float32, with_offset=False) for outputs in (32, 16)
    )
    for matrices in (gate_up, down):
        matrices.scale[[0, 2]] = float("nan")
    chosen, probabilities = torch.tensor([[1, -1]]), torch.ones(1, 2)
    assert int4.decode_experts_int4(torch.ones(1, 16), chosen, probabilities, gate_up, down).isfinite().all()


CASES = {
    check.__name__: check
    for check in (
        repacked_words_are_the_references,
        any_choice_of_experts_and_any_width_give_the_reference,
        any_two_group_sizes_give_the_reference,
        eight_tokens_of_eight_experts_in_bfloat16_give_the_reference,
        nobody_and_nothing_chosen_give_zeros_and_nothing,
        experts_that_nobody_chose_are_not_read,
    )
}
