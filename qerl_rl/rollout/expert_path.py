"""Expert layers with an adapter inside each expert: on AMX tiles, elsewhere with int8 products expert by expert.

vLLM's fused CPU kernel goes from tokens to the weighted sum in one call, and an adapter has to act in its middle
(before SwiGLU). Here the tokens are grouped by expert and each group passes the same packed int8 weights, so the
weights are stored once whichever path runs; what acts between the products is in `adapter_loops.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qerl_rl.platform.loops import array, bits_of
from qerl_rl.platform.threads import on_threads
from qerl_rl.rollout.adapter_loops import TOGETHER, activate, gather, group, share
from qerl_rl.rollout.ascend.experts import ADAPTED_SCHEME, adapt_experts
from qerl_rl.rollout.ascend.rewrite import is_ascend, scheme_name
from qerl_rl.rollout.int8_experts import TOKENS_PER_PASS, Int8Experts, has_tiles_for, in_place_of_apply
from qerl_rl.rollout.int8_loops import sum_shares


class ExpertsWithAdapters:
    """The expert computation of one layer on one rank, with vLLM's products.

    weights: gate_up int8 [experts, 2 * intermediate, hidden + 4] and down int8 [experts, hidden, intermediate + 4], as
    torch.ops._C.convert_weight_packed packs them; scales: float32 [experts, rows, 1] of both. Adapters: float32, the
    scale inside B; gate_up_a [experts, rank, hidden], gate_up_b [experts, 2 * intermediate, rank], down_a [experts,
    rank, intermediate], down_b [experts, hidden, rank]. Weights and A are read at every call, B at `pack_adapters`.
    """

    def __init__(
        self,
        weights: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[torch.Tensor, torch.Tensor],
        gate_up_a: torch.Tensor,
        gate_up_b: torch.Tensor,
        down_a: torch.Tensor,
        down_b: torch.Tensor,
    ) -> None:
        self._gate_up, self._down = (list(zip(*pair, strict=True)) for pair in zip(weights, scales, strict=True))
        self._down_projections, self._up_projections = (gate_up_a, down_a), (gate_up_b, down_b)
        self._ups: tuple[np.ndarray, ...] = ()
        self.pack_adapters()

    def pack_adapters(self) -> None:
        """Adapters have changed: B becomes [experts, rank, outputs], the rank a multiple of 4 by zeros."""
        missing = -self._up_projections[0].shape[2] % TOGETHER
        padded = (torch.nn.functional.pad(b, (0, missing)) for b in self._up_projections)
        self._ups = tuple(array(b.transpose(1, 2).contiguous(), np.float32) for b in padded)

    def __call__(
        self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, local_ids: torch.Tensor
    ) -> None:
        """output bfloat16 [tokens, hidden] = the weighted sum over each token's experts.

        Args: hidden_states bfloat16 [tokens, hidden]; topk_weights float32 [tokens, k]; local_ids int [tokens, k], the
        number of the expert on this rank or -1 for one that is elsewhere.
        """
        inputs = (output, hidden_states, topk_weights, local_ids.int())
        for some in zip(*(tensor.split(TOKENS_PER_PASS) for tensor in inputs), strict=True):
            self._compute(*some)

    def _compute(
        self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor
    ) -> None:
        starts, order, places, chosen = group(array(ids.contiguous(), np.int32), len(self._gate_up))
        down, down_of_down = (array(a.contiguous(), np.float32) for a in self._down_projections)
        (up, up_of_down), slots = self._ups, len(order)
        rows = hidden_states.new_empty(slots, output.shape[1])
        gate_up, products = rows.new_empty(slots, up.shape[2]), torch.empty_like(rows)
        activated = rows.new_empty(slots, up.shape[2] // 2)
        # What rounds up the rank stays 0.
        low, low_of_down = np.zeros((2, slots, up.shape[1]), np.float32)
        tokens, weights = bits_of(hidden_states.contiguous()), array(topk_weights.contiguous(), np.float32).reshape(-1)

        counts = np.diff(starts)[chosen].tolist()
        pieces = [tensor.split(counts) for tensor in (rows, gate_up, activated, products)]

        def some_experts(turns: list[int]) -> None:
            experts = chosen[turns]
            gather(experts, starts, order, ids.shape[1], tokens, down, bits_of(rows), low)
            _multiply(self._gate_up, experts, turns, *pieces[:2])
            activate(experts, starts, bits_of(gate_up), low, up, bits_of(activated), down_of_down, low_of_down)
            _multiply(self._down, experts, turns, *pieces[2:])
            # Each expert's share is rounded, as in the fused kernel, before they are summed: the sum of two experts is
            # then the same bits whether one rank holds both or the ranks' bfloat16 outputs are added.
            share(experts, starts, order, bits_of(products), low_of_down, up_of_down, weights, bits_of(rows))

        on_threads(some_experts, range(len(chosen)))
        sum_shares(places, bits_of(rows), bits_of(output))


def _multiply(
    linears: list[tuple[torch.Tensor, torch.Tensor]],
    experts: np.ndarray,
    turns: list[int],
    rows: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
) -> None:
    """out[turn] bfloat16 [.., N] = rows[turn] [.., K], rounded to int8, times the weight and scale of the turn's
    expert."""
    product = torch.ops._C.int8_scaled_mm_with_quant.default
    for expert, turn in zip(experts.tolist(), turns, strict=True):
        weight, scale = linears[expert]
        out[turn].copy_(product(rows[turn], weight, scale, None, torch.bfloat16, True))


ADAPTED_KERNEL = "CPUExpertsInt8"
"""The kernel whose packed weights the path here reads."""


ADAPTED_KERNELS = frozenset([ADAPTED_KERNEL, ADAPTED_SCHEME])
"""All that adapters can be beside."""


def expert_kernel(layer: Any) -> str:
    """The name of what computes the experts of vLLM's layer."""
    if is_ascend(layer):
        return scheme_name(layer)
    return type(layer.quant_method.moe_kernel.fused_experts).__name__


def attach_expert_path(
    layer: Any, gate_up_a: torch.Tensor, gate_up_b: torch.Tensor, down_a: torch.Tensor, down_b: torch.Tensor
) -> Callable[[], None]:
    """Make vLLM's expert layer compute with these adapters, on the int8 weights that it holds.

    Returns: what to call when the adapters have been written. Raises: RuntimeError when the layer's weights are not
    those of an int8 kernel.
    """
    if is_ascend(layer):
        adapt_experts(layer, gate_up_a, gate_up_b, down_a, down_b)
        return lambda: None
    if expert_kernel(layer) != ADAPTED_KERNEL:
        raise RuntimeError(
            f"expert adapters need int8 (W8A8) experts; this engine computes with {expert_kernel(layer)}"
        )
    kernel = layer.quant_method.moe_kernel.fused_experts
    weights, scales = (layer.w13_weight, layer.w2_weight), (layer.w13_weight_scale, layer.w2_weight_scale)
    experts: ExpertsWithAdapters | Int8Experts
    if has_tiles_for(gate_up_a.shape[2], down_a.shape[2]):
        experts = Int8Experts(weights, scales, ((gate_up_a, gate_up_b), (down_a, down_b)))
    else:
        experts = ExpertsWithAdapters(weights, scales, gate_up_a, gate_up_b, down_a, down_b)
    kernel.apply = in_place_of_apply(experts)
    return experts.pack_adapters
