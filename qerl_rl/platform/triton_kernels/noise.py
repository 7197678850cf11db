"""Noise from a counter-based generator, drawn where it is added."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _upper_product(word, factor_high, factor_low):  # type: ignore[no-untyped-def]
    """The upper 64 bits of the product of two unsigned words of 64 bits, one of them in halves."""
    low, high = word & 0xFFFFFFFF, (word >> 32) & 0xFFFFFFFF
    first, second = low * factor_high, high * factor_low
    carried = ((low * factor_low >> 32) & 0xFFFFFFFF) + (first & 0xFFFFFFFF) + (second & 0xFFFFFFFF)
    return high * factor_high + ((first >> 32) & 0xFFFFFFFF) + ((second >> 32) & 0xFFFFFFFF) + (carried >> 32)


@triton.jit
def _add_noise(clean, noisy, count, seed, stream, step, sigma, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Element i takes the words 2i and 2i + 1 of the sequence that numpy's Philox (4 x 64 bits, 10 rounds) gives."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    # numpy counts before it draws. Four words a count are two elements. All words are int64, whose products wrap like
    # those of uint64: Triton-Ascend has no unsigned ones.
    c0 = (index // 2 + 1).to(tl.int64)
    c1 = c0 * 0
    c2 = c0 * 0
    c3 = c0 * 0 + step
    k0 = c0 * 0 + seed
    k1 = c0 * 0 + stream
    for _ in tl.static_range(10):
        high0 = _upper_product(c0, 0xD2E7470E, 0xE14C6C93)
        high1 = _upper_product(c2, 0xCA5A8263, 0x95121157)
        low0 = c0 * -0x2D18B8F11EB3936D
        low1 = c2 * -0x35A57D9C6AEDEEA9
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 - 0x61C8864680B583EB
        k1 = k1 - 0x4498517A7B3558C5
    second = (index % 2) == 1
    # 53 bits of each word, as numpy makes its floats of them.
    first_bits = (tl.where(second, c2, c0) >> 11) & 0x1FFFFFFFFFFFFF
    angle_bits = (tl.where(second, c3, c1) >> 11) & 0x1FFFFFFFFFFFFF
    u = first_bits.to(tl.float32) * 1.1102230246251565e-16
    rest = (9007199254740992 - first_bits).to(tl.float32) * 1.1102230246251565e-16
    # -log(1 - u): by its series where 1 - u has lost what u is.
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + u * 0.2))))
    radius = tl.sqrt(2.0 * tl.where(u < 0.015625, series, -tl.log(rest)))
    normal = radius * tl.cos(angle_bits.to(tl.float32) * (1.1102230246251565e-16 * 6.283185307179586))
    inside = index < count
    tl.store(noisy + index, tl.load(clean + index, mask=inside).to(tl.float32) + sigma * normal, mask=inside)


def add_noise(clean: torch.Tensor, seed: int, stream: int, step: int, sigma: float) -> torch.Tensor:
    """`platform.ops.add_noise`, within 1e-5 * sigma of its reference: logarithm and cosine are float32 here.

    Returns: float32 of the shape of `clean`.
    """
    flat = clean.contiguous()
    noisy = torch.empty(clean.shape, dtype=torch.float32, device=clean.device)
    count = clean.numel()
    # Scalars are signed; the kernel reads their bits as unsigned.
    words = [(word + (1 << 63)) % (1 << 64) - (1 << 63) for word in (seed, stream, step)]
    _add_noise[(triton.cdiv(count, BLOCK),)](flat, noisy, count, *words, sigma, block=BLOCK)
    return noisy
