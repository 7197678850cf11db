"""Expert layers in int8 on a CPU with AMX, with or without an adapter in each expert (`int8_loops.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qerl_rl.platform.amx import FULL_TILES, has_amx
from qerl_rl.platform.loops import array, bits_of
from qerl_rl.platform.threads import on_threads
from qerl_rl.rollout.int8_loops import Matrices, experts_of_slots, experts_of_tokens, group_tokens, sum_shares
from qerl_rl.rollout.patching import existing

TOKENS_PER_PASS = 1024
"""Bounds the memory of a prefill: a pass holds top_k * hidden bfloat16 numbers a token."""
COLUMNS = 64
"""Of a tile of int8: what hidden and intermediate sizes are whole numbers of."""
_kept = np.empty(0, np.uint16)


def has_tiles_for(hidden: int, intermediate: int) -> bool:
    """Whether experts of these sizes are computed here, on this machine."""
    return hidden % COLUMNS == 0 and intermediate % COLUMNS == 0 and has_amx()


class Int8Experts:
    """The expert computation of one layer on one rank.

    weights: gate_up int8 [experts, 2 * intermediate, hidden + 4] and down int8 [experts, hidden, intermediate + 4], as
    torch.ops._C.convert_weight_packed packs them; scales: float32 [experts, rows, 1] of both. adapters: none, or A
    [experts, rank, inputs] and B [experts, outputs, rank] of both, float32 with the scale inside B. Weights and scales
    are read at every call, adapters at `pack_adapters`. Raises: RuntimeError on a processor without AMX.
    """

    def __init__(
        self,
        weights: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor, torch.Tensor],
        adapters: tuple[tuple[torch.Tensor, torch.Tensor], ...] = (),
    ) -> None:
        if not has_amx():
            raise RuntimeError("these experts are computed on AMX tiles, and this processor has none")
        self._weights, self._scales, self._adapters = weights, scales, adapters
        nothing = torch.empty(0, 0, 0, 16, 16, 2, dtype=torch.bfloat16)
        self._tiles = [(nothing, nothing)] * 2
        self._matrices: tuple[Matrices, ...] = ()
        self._places: list[int] = []
        self.pack_adapters()

    def pack_adapters(self) -> None:
        """Adapters have changed: round them to bfloat16, in the order of tiles."""
        self._tiles = [(down_tiles(a), up_tiles(b)) for a, b in self._adapters] or self._tiles
        self._places = []

    def __call__(
        self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, local_ids: torch.Tensor
    ) -> None:
        """output bfloat16 [tokens, hidden] = the weighted sum over each token's experts.

        Args: hidden_states bfloat16 [tokens, hidden]; topk_weights float32 [tokens, k]; local_ids int [tokens, k], the
        number of the expert on this rank or -1 for one that is elsewhere.
        """
        places = [tensor.data_ptr() for tensor in (*self._weights, *self._scales)]
        if places != self._places:
            every = zip(self._weights, self._scales, self._tiles, strict=True)
            self._matrices, self._places = tuple(_matrices(*one) for one in every), places
        inputs = (output, hidden_states, topk_weights, local_ids)
        if len(output) <= TOKENS_PER_PASS:
            _compute(*inputs, *self._matrices)
            return
        for some in zip(*(tensor.split(TOKENS_PER_PASS) for tensor in inputs), strict=True):
            _compute(*some, *self._matrices)


def _matrices(weight: torch.Tensor, scale: torch.Tensor, tiles: tuple[torch.Tensor, torch.Tensor]) -> Matrices:
    blocks = scale.view(len(weight), -1, 32)
    return Matrices(array(weight, np.int8), array(blocks, np.float32), *map(bits_of, tiles))


def _compute(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    ids: torch.Tensor,
    gate_up: Matrices,
    down: Matrices,
) -> None:
    rows, out = bits_of(hidden_states.contiguous()), bits_of(output)
    chosen, weights = array(ids.int().contiguous(), np.int32), array(topk_weights.contiguous(), np.float32)
    shares = _shares(chosen.size, rows.shape[1])
    if torch.get_num_threads() == 1:
        experts_of_tokens(FULL_TILES, rows, chosen, weights, gate_up, down, shares, out)
        return
    tokens, places, experts = group_tokens(rows, chosen, weights, len(gate_up.weights))

    def some_experts(numbers: list[int]) -> None:
        experts_of_slots(FULL_TILES, np.array(numbers), tokens, gate_up, down, shares)

    on_threads(some_experts, experts.tolist())
    sum_shares(places, shares.reshape(-1, rows.shape[1]), out)


def _shares(rows: int, hidden: int) -> np.ndarray:
    """Memory that the process keeps: new pages take longer than what is written to them."""
    global _kept
    if _kept.size < rows * hidden:
        _kept = np.empty(rows * hidden, np.uint16)
    return _kept[: rows * hidden].reshape(rows, hidden // 32, 32)


def down_tiles(a: torch.Tensor) -> torch.Tensor:
    """A [E, rank, K] as bfloat16 [E, K / 32, R / 16, 16, 16, 2], R the rank made a multiple of 32 by zeros: tiles of 32
    columns of 16 rows, two columns together."""
    padded = _padded(a, 1)
    return padded.unflatten(2, (-1, 16, 2)).unflatten(1, (-1, 16)).permute(0, 3, 1, 4, 2, 5).bfloat16().contiguous()


def up_tiles(b: torch.Tensor) -> torch.Tensor:
    """B [E, N, rank] as bfloat16 [E, N / 16, R / 32, 16, 16, 2]: the same tiles, those of a row of B together."""
    padded = _padded(b, 2)
    return padded.unflatten(2, (-1, 16, 2)).unflatten(1, (-1, 16)).permute(0, 1, 3, 4, 2, 5).bfloat16().contiguous()


def _padded(matrix: torch.Tensor, dimension: int) -> torch.Tensor:
    missing = -matrix.shape[dimension] % 32
    shape = list(matrix.shape)
    shape[dimension] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dimension)


def in_place_of_apply(experts: Callable[..., None]) -> Callable[..., None]:
    """What vLLM may call as a kernel's `apply`, which it does by keywords: experts(output, hidden_states, weights, ids)
    with their numbers on this rank, -1 for those elsewhere."""

    def apply(
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        **unused: Any,
    ) -> None:
        local_ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        experts(output, hidden_states, topk_weights, local_ids)

    return apply


def experts_on_tiles() -> None:
    """Compute int8 experts on AMX tiles, where there are some.

    Without it a prefill's experts take half as long again: vLLM's kernel waits for weights.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt8

    original = existing(CPUExpertsInt8, "process_weights_after_loading")

    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        original(self, layer)
        weights, scales = (layer.w13_weight, layer.w2_weight), (layer.w13_weight_scale, layer.w2_weight_scale)
        if has_tiles_for(weights[1].shape[1], weights[1].shape[2] - 4):
            self.apply = in_place_of_apply(Int8Experts(weights, scales))

    CPUExpertsInt8.process_weights_after_loading = process_weights_after_loading
