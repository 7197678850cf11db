"""One or more uses of every operator of platform.ops (but that of Triton alone), on the tensors of any device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from qerl_rl.model.base_weight import Base
from qerl_rl.model.expert_mlp import expert_mlp
from qerl_rl.model.grouped_experts import grouped_expert_mlp
from qerl_rl.model.grouped_linear import Adapter
from qerl_rl.platform import ops
from qerl_rl.quant.formats import FORMATS

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN = 32, 64, 48, 4, 2
ROWS = [20, 0, 12, 0]
BFLOAT16, FLOAT32, INT8, INT32, INT64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64


class Tensors:
    """Makes a case's tensors on one device, and remembers which of them take part in the gradient.

    Args: dtype: of floats, where the case does not say; seed: of their values, which are zeros without one.
    """

    def __init__(self, device: str, dtype: torch.dtype = BFLOAT16, seed: int | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.leaves: list[torch.Tensor] = []
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self.dtype
        if self._generator is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.randn(shape, generator=self._generator).to(dtype).to(self.device)

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.leaves.append(self.floats(*shape, dtype=dtype).requires_grad_())
        return self.leaves[-1]

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        if self._generator is None:
            return torch.zeros(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)

    def int8(self, *shape: int) -> torch.Tensor:
        return self.integers(-128, 128, *shape, dtype=INT8)

    def packed(self, *shape: int) -> torch.Tensor:
        """Eight int4 in each element."""
        return self.integers(-(1 << 31), 1 << 31, *shape, dtype=INT32)

    def order(self, count: int) -> torch.Tensor:
        """int32: the numbers below `count` in some order."""
        if self._generator is None:
            return torch.zeros(count, dtype=INT32, device=self.device)
        return torch.randperm(count, generator=self._generator).int().to(self.device)


Case = Callable[[Tensors], Any]


def _base(make: Tensors, kind: str, outputs: int, inputs: int) -> Base:
    if kind == "float":
        return Base((make.floats(EXPERTS, outputs, inputs),))
    format = FORMATS[kind](32 if kind.startswith("w4") else 0)
    of_dtype = {INT8: make.int8, INT32: make.packed}
    tensors = []
    for part in format.parts:
        shape = (EXPERTS, outputs, inputs // part.columns if part.columns else 1)
        tensors.append(
            of_dtype[part.dtype](*shape) if part.dtype in of_dtype else make.floats(*shape, dtype=part.dtype)
        )
    return Base(tuple(tensors), format)


def _experts(kind: str) -> Case:
    def compute(make: Tensors) -> Any:
        bases = _base(make, kind, 2 * HIDDEN, HIDDEN), _base(make, kind, HIDDEN, HIDDEN)
        first = Adapter(make.leaf(EXPERTS, 8, HIDDEN), make.leaf(EXPERTS, 2 * HIDDEN, 8), 2.0)
        second = Adapter(make.leaf(EXPERTS, 8, HIDDEN), make.leaf(EXPERTS, HIDDEN, 8), 2.0)
        probabilities = make.leaf(TOKENS, dtype=FLOAT32)
        return expert_mlp(make.leaf(TOKENS, HIDDEN), probabilities, ROWS, bases, (first, second))

    return compute


def _stored_experts(kind: str) -> Case:
    """Activations of 16 bits: the weights are multiplied with as they are stored."""

    def compute(make: Tensors) -> Any:
        bases = _base(make, kind, 2 * HIDDEN, HIDDEN), _base(make, kind, HIDDEN, HIDDEN)
        x, probabilities = make.leaf(TOKENS, HIDDEN, dtype=BFLOAT16), make.leaf(TOKENS, dtype=FLOAT32)
        return grouped_expert_mlp(x, probabilities, ROWS, bases, (None, None))

    return compute


def _int8_product(scale_dtype: torch.dtype) -> Case:
    def compute(make: Tensors) -> Any:
        x_scale, weight_scale = make.floats(TOKENS, dtype=FLOAT32), make.floats(EXPERTS, WIDTH, dtype=scale_dtype)
        x, weight = make.int8(TOKENS, HIDDEN), make.int8(EXPERTS, WIDTH, HIDDEN)
        return ops.grouped_matmul_int8(x, x_scale * 1e-3, weight, weight_scale, ROWS)

    return compute


def _ends(make: Tensors) -> torch.Tensor:
    return torch.tensor(list(accumulate(ROWS)), dtype=INT64, device=make.device)


def _routed(make: Tensors) -> Any:
    return ops.routed_matmul(make.floats(TOKENS, HIDDEN), make.floats(EXPERTS, WIDTH, HIDDEN).mT, _ends(make))


def _routed_int8(make: Tensors) -> Any:
    x_scale, scale = make.floats(TOKENS, dtype=FLOAT32) * 1e-3, make.floats(EXPERTS, WIDTH, dtype=BFLOAT16)
    return ops.routed_matmul_int8(
        make.int8(TOKENS, HIDDEN), x_scale, make.int8(EXPERTS, HIDDEN, WIDTH), scale, _ends(make)
    )


def _int4_product(groups: int, with_offset: bool) -> Case:
    def compute(make: Tensors) -> Any:
        x, packed = make.leaf(TOKENS, HIDDEN, dtype=BFLOAT16), make.packed(EXPERTS, HIDDEN, WIDTH // 8)
        scale, offset = (make.floats(EXPERTS, groups, WIDTH, dtype=BFLOAT16) for _ in range(2))
        return ops.grouped_matmul_int4(x, packed, scale, ROWS, offset if with_offset else None)

    return compute


def _rotary(batch: int, learned: bool) -> Case:
    def compute(make: Tensors) -> Any:
        angles = make.leaf if learned else make.floats
        cos, sin = angles(TOKENS, 1, 1, HIDDEN), angles(TOKENS, 1, 1, HIDDEN)
        return ops.rotary(make.leaf(TOKENS, batch, 4, HIDDEN), cos, sin)

    return compute


def _attention(make: Tensors) -> Any:
    query, key, value = make.leaf(TOKENS, 4, 32), make.leaf(TOKENS, 2, 32), make.leaf(TOKENS, 2, 16)
    return ops.packed_attention(query, key, value, [20, 0, 12])


def _unpermute(make: Tensors) -> Any:
    rows = TOKENS * CHOSEN
    return ops.token_unpermute(make.leaf(rows, HIDDEN), make.order(rows), make.leaf(TOKENS, CHOSEN))


CASES: dict[str, Case] = {
    "rms_norm": lambda make: ops.rms_norm(make.leaf(TOKENS, 1, HIDDEN), make.leaf(HIDDEN), 1e-6),
    "rms_norm, noisy weight": lambda make: ops.rms_norm(
        make.leaf(TOKENS, HIDDEN, dtype=BFLOAT16), make.leaf(HIDDEN, dtype=FLOAT32), 1e-6
    ),
    "swiglu": lambda make: ops.swiglu(make.leaf(TOKENS, 2 * WIDTH), make.leaf(TOKENS, dtype=FLOAT32)),
    "rotary": _rotary(1, learned=False),
    "rotary, learned angles": _rotary(2, learned=True),
    "packed_attention": _attention,
    "grouped_matmul": lambda make: ops.grouped_matmul(
        make.leaf(TOKENS, HIDDEN), make.leaf(EXPERTS, WIDTH, HIDDEN), ROWS
    ),
    "grouped_matmul, one group": lambda make: ops.grouped_matmul(
        make.leaf(TOKENS, HIDDEN), make.leaf(1, WIDTH, HIDDEN), [TOKENS]
    ),
    "grouped_matmul_int8": _int8_product(BFLOAT16),
    "grouped_matmul_int8, float16": _int8_product(FLOAT32),
    "grouped_matmul_int8_weights": lambda make: ops.grouped_matmul_int8_weights(
        make.leaf(TOKENS, HIDDEN, dtype=BFLOAT16), make.int8(EXPERTS, WIDTH, HIDDEN), ROWS
    ),
    "repack_int4": lambda make: ops.repack_int4(make.packed(EXPERTS, WIDTH, HIDDEN // 8)),
    "grouped_matmul_int4, a scale a column": _int4_product(1, with_offset=False),
    "grouped_matmul_int4, groups": _int4_product(2, with_offset=True),
    "routed_matmul": _routed,
    "routed_matmul_int8": _routed_int8,
    "token_permute": lambda make: ops.token_permute(
        make.leaf(TOKENS, HIDDEN), make.integers(0, EXPERTS, TOKENS, CHOSEN, dtype=INT64)
    ),
    "token_unpermute": _unpermute,
    "gating_top_k_softmax": lambda make: ops.gating_top_k_softmax(make.leaf(TOKENS, EXPERTS, dtype=FLOAT32), CHOSEN),
    "dynamic_quantize": lambda make: ops.dynamic_quantize(make.floats(TOKENS, HIDDEN, dtype=BFLOAT16)),
    "pack_int4": lambda make: ops.pack_int4(make.integers(-8, 8, EXPERTS, HIDDEN, WIDTH, dtype=INT32)),
    "add_noise": lambda make: ops.add_noise(make.floats(HIDDEN, dtype=BFLOAT16), 1, 2, 3, 0.1),
    "to_fractal_nz": lambda make: ops.to_fractal_nz(make.floats(EXPERTS, HIDDEN, WIDTH)),
    "experts, float": _experts("float"),
    "experts, w8a8": _experts("w8a8"),
    "experts, w4a16": _experts("w4a16"),
    "stored experts, w8a8": _stored_experts("w8a8"),
    "stored experts, w4a16": _stored_experts("w4a16"),
}


def computed(case: Case, make: Tensors) -> list[torch.Tensor | None]:
    """What a case returns, then the gradients of its leaves for some gradient of its first result."""
    found = case(make)
    outputs: list[torch.Tensor | None] = list(found) if isinstance(found, tuple) else [found]
    if make.leaves:
        first = outputs[0]
        assert first is not None
        outputs += torch.autograd.grad(
            first, make.leaves, make.floats(*first.shape, dtype=first.dtype), allow_unused=True
        )
    return outputs
