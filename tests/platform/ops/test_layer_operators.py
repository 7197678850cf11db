"""Norm, activation, rotary embedding and attention: against transformers, torch and loops, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

from qerl_rl.platform import npu_adaptor, prepare_megatron
from qerl_rl.platform.device import CPU
from qerl_rl.platform.ops import packed_attention, rms_norm, rotary, swiglu
from tests.ranks import RankPool

SIMPLE = settings(deadline=None, derandomize=True, max_examples=15)


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _leaf(*shape: int, seed: int) -> torch.Tensor:
    return _random(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_one_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    module = Qwen3MoeRMSNorm(48, eps=1e-5).to(dtype)
    module.weight.data = _random(48, seed=1, dtype=dtype)
    x = _random(3, 7, 48, seed=2, dtype=dtype)
    assert torch.equal(rms_norm(x, module.weight, 1e-5), module(x))


def test_rms_norm_with_a_wider_weight_multiplies_in_its_type() -> None:
    x, weight = _random(5, 32, seed=1, dtype=torch.bfloat16), _random(32, seed=2, dtype=torch.float32)
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == torch.bfloat16
    # The normalized input and the result are rounded to the 8 bits of bfloat16.
    expected = F.rms_norm(x.float(), (32,), weight, 1e-6)
    torch.testing.assert_close(found.float(), expected, rtol=2 * 2**-8 + 2**-15, atol=0)


def test_gradients_of_norm_rotary_and_swiglu_are_the_numerical_ones() -> None:
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (_leaf(3, 6, seed=1), _leaf(6, seed=2)))
    angles = _leaf(4, 1, 1, 6, seed=4), _leaf(4, 1, 1, 6, seed=5)
    assert torch.autograd.gradcheck(rotary, (_leaf(4, 2, 3, 6, seed=3), *angles))
    assert torch.autograd.gradcheck(swiglu, (_leaf(5, 8, seed=6), _leaf(5, seed=7)))


def test_swiglu_is_silu_of_the_first_half_times_the_second() -> None:
    hidden, probabilities = _random(6, 10, seed=1), _random(6, seed=2)
    expected = F.silu(hidden[:, :5]) * hidden[:, 5:] * probabilities[:, None]
    torch.testing.assert_close(swiglu(hidden, probabilities), expected)


def test_rotary_is_the_one_of_transformers() -> None:
    x, cos, sin = _random(9, 2, 4, 16, seed=1), _random(9, 2, 16, seed=2), _random(9, 2, 16, seed=3)
    theirs, _ = apply_rotary_pos_emb(*(t.transpose(0, 1) for t in (x, x, cos, sin)), unsqueeze_dim=2)
    torch.testing.assert_close(rotary(x, cos.unsqueeze(2), sin.unsqueeze(2)), theirs.transpose(0, 1))


def _megatron_rotary() -> list[tuple[bool, bool]]:
    """For whole and partial rotation: (same result as Megatron's, our operator was called)."""
    prepare_megatron(CPU)
    from megatron.core.models.common.embeddings import rope_utils

    name, called = "_apply_rotary_pos_emb_bshd", []
    theirs, ours = getattr(rope_utils, name), npu_adaptor.rotary
    npu_adaptor.rotary = lambda *args: called.append(True) or ours(*args)  # type: ignore[func-returns-value]
    npu_adaptor.fused_rotary()
    found = []
    for width in (16, 8):
        called.clear()
        x, freqs = _random(9, 2, 4, 16, seed=1, dtype=torch.float32), _random(9, 1, 1, width, seed=2)
        patched = getattr(rope_utils, name)(x, freqs, mscale=0.5)
        found.append((torch.equal(patched, theirs(x, freqs, mscale=0.5)), bool(called)))
    setattr(rope_utils, name, theirs)
    npu_adaptor.rotary = ours
    return found


def test_megatron_gets_the_fused_rotary_embedding_where_all_of_a_head_turns(one_rank: RankPool) -> None:
    assert one_rank(_megatron_rotary) == [[(True, True), (True, False)]]


def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """Token by token, head by head."""
    rows, start = [], 0
    group = query.shape[1] // max(key.shape[1], 1)
    for length in lengths:
        for last in range(start, start + length):
            heads = []
            for head in range(query.shape[1]):
                seen = slice(start, last + 1)
                weights = (key[seen, head // group] @ query[last, head] * scale).softmax(0)
                heads.append(weights @ value[seen, head // group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


@SIMPLE
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(sum),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    value_width=st.sampled_from([4, 6]),
)
def test_packed_attention_and_its_gradients_are_those_of_loops(
    lengths: list[int], key_heads: int, group: int, value_width: int
) -> None:
    tokens = sum(lengths)
    found, expected = (
        [
            _leaf(tokens, key_heads * group, 6, seed=1),
            _leaf(tokens, key_heads, 6, seed=2),
            _leaf(tokens, key_heads, value_width, seed=3),
        ]
        for _ in range(2)
    )
    y, oracle = packed_attention(*found, lengths, 0.3), _dense_attention(*expected, lengths, 0.3)
    torch.testing.assert_close(y, oracle)
    gradient = _random(*y.shape, seed=4)
    y.backward(gradient)
    oracle.backward(gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_scale_of_attention_is_by_default_that_of_the_width() -> None:
    query, key, value = (_random(5, 2, 16, seed=seed) for seed in range(3))
    torch.testing.assert_close(packed_attention(query, key, value, [5]), _dense_attention(query, key, value, [5], 0.25))
