"""Expert layers with an adapter inside each expert: on AMX tiles, elsewhere with int8 products expert by expert.

vLLM's fused CPU kernel goes from tokens to the weighted sum in one call, and an adapter has to act in its middle
(before SwiGLU). Here the tokens are grouped by expert and each group passes the same packed int8 weights, so the
weights are stored once whichever path runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

from qerl_rl.rollout.ascend.experts import ADAPTED_SCHEME, adapt_experts
from qerl_rl.rollout.ascend.rewrite import is_ascend, scheme_name
from qerl_rl.rollout.int8_experts import TOKENS_PER_PASS, Int8Experts, has_tiles_for, in_place_of_apply


class ExpertsWithAdapters:
    """The expert computation of one layer on one rank, with vLLM's products.

    weights: gate_up int8 [experts, 2 * intermediate, hidden + 4] and down int8 [experts, hidden, intermediate + 4], as
    torch.ops._C.convert_weight_packed packs them; scales: float32 [experts, rows, 1] of both. Adapters: float32, the
    scale inside B; gate_up_a [experts, rank, hidden], gate_up_b [experts, 2 * intermediate, rank], down_a [experts,
    rank, intermediate], down_b [experts, hidden, rank]. They are read at every call: update them in place.
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
        self.experts = gate_up_a.shape[0]
        self.gate_up = _per_expert(weights[0], scales[0], gate_up_a, gate_up_b)
        self.down = _per_expert(weights[1], scales[1], down_a, down_b)
        self.intermediate, self.hidden = gate_up_b.shape[1] // 2, gate_up_a.shape[2]

    def pack_adapters(self) -> None:
        """Adapters have changed, which are read where they are."""

    def __call__(
        self, output: torch.Tensor, hidden_states: torch.Tensor, topk_weights: torch.Tensor, local_ids: torch.Tensor
    ) -> None:
        """output bfloat16 [tokens, hidden] = the weighted sum over each token's experts.

        Args: hidden_states bfloat16 [tokens, hidden]; topk_weights float32 [tokens, k]; local_ids int [tokens, k], the
        number of the expert on this rank or -1 for one that is elsewhere.
        """
        # A pass holds top_k * (hidden + 2 * intermediate) float32 numbers a token.
        inputs = (output, hidden_states, topk_weights, local_ids.long())
        for result, *some in zip(*(tensor.split(TOKENS_PER_PASS) for tensor in inputs), strict=True):
            result.copy_(self._compute(*some))

    def _compute(
        self, hidden_states: torch.Tensor, topk_weights: torch.Tensor, local_ids: torch.Tensor
    ) -> torch.Tensor:
        tokens, top_k = local_ids.shape
        ids = local_ids.flatten()
        counts = torch.bincount(ids + 1, minlength=self.experts + 1).tolist()
        order = ids.argsort(stable=True)[counts[0] :]
        output = torch.zeros(tokens, self.hidden)
        if len(order) == 0:
            return output
        token = order.div(top_k, rounding_mode="floor")
        rows = hidden_states[token]
        gate_up = _grouped_linear(rows, rows.float(), self.gate_up, counts[1:], 2 * self.intermediate)
        gate, up = gate_up.chunk(2, dim=1)
        # Three times as fast here as vLLM's silu_and_mul.
        activated = silu(gate).mul_(up)
        down = _grouped_linear(activated.to(rows.dtype), activated, self.down, counts[1:], self.hidden)
        down.mul_(topk_weights.flatten()[order].unsqueeze(1))
        # Each expert's share is rounded, as in the fused kernel, before they are summed: the sum of two experts is then
        # the same bits whether one rank holds both or the ranks' bfloat16 outputs are added.
        return output.index_add_(0, token, down.to(rows.dtype).float())


Linear = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _per_expert(weight: torch.Tensor, scale: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> list[Linear]:
    """Views of each expert's packed weight, scale, A^T and B^T."""
    return list(zip(weight, scale, a.transpose(1, 2), b.transpose(1, 2), strict=True))


def _grouped_linear(
    rows: torch.Tensor, rows32: torch.Tensor, linears: list[Linear], counts: list[int], width: int
) -> torch.Tensor:
    """Each expert's linear with its adapter over its group of rows; float32 [rows, width]."""
    output = torch.empty(len(rows), width)
    groups = zip(linears, rows.split(counts), rows32.split(counts), output.split(counts), counts, strict=True)
    for (weight, scale, a_t, b_t), group, group32, result, count in groups:
        if count:
            result.copy_(torch.ops._C.int8_scaled_mm_with_quant(group, weight, scale, None, group.dtype, True))
            result.addmm_(torch.mm(group32, a_t), b_t)
    return output


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
