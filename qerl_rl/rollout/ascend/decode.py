"""W4A16 experts of a few rows in one launch, where rollout.ascend.fused_int4_decode asks for it.

vllm-ascend computes the experts of a decode step as it does those of a prefill: two grouped products, made for many
rows an expert, and SwiGLU between them. Its weights lie as the kernel of `platform.ops.decode_experts_int4` reads them.
"""

from __future__ import annotations

from typing import Any

import torch

from qerl_rl.platform import ops
from qerl_rl.rollout.patching import existing

ENDS, COUNTS = 0, 1
"""What vllm-ascend's list of groups may hold: where each expert's rows end, or how many they are."""


def fuse_small_int4_experts() -> None:
    """Give one kernel the experts of up to `ops.MOST_PAIRS` rows: after tokens were dealt to the ranks, before they are
    added up again. Of whatever else, nothing changes.

    Raises: RuntimeError without triton-ascend, or where vllm-ascend computes experts in another place.
    """
    if not ops.has_triton_ascend():
        raise RuntimeError(
            "rollout.ascend.fused_int4_decode needs triton-ascend, which is not installed here: install qerl_rl[npu], "
            "or set it to false"
        )
    from vllm_ascend.ops.fused_moe.moe_comm_method import MoECommMethod

    original = existing(MoECommMethod, "_apply_mlp")

    def apply_mlp(method: Any, mlp_compute_input: Any) -> tuple[torch.Tensor, Any]:
        if not _is_small_int4(mlp_compute_input):
            return original(method, mlp_compute_input)
        # The second of its results tells another stream when the down projection begins, beside which it may compute.
        started = torch.get_device_module(mlp_compute_input.hidden_states.device).current_stream().record_event()
        return _experts(mlp_compute_input), started

    MoECommMethod._apply_mlp = apply_mlp


def _is_small_int4(given: Any) -> bool:
    """Whether these are int4 weights with scales and offsets of groups (no other scheme has offsets), and few rows."""
    rows, packed = given.hidden_states, given.weights.w1
    is_int4 = given.weights.w1_offset is not None and isinstance(packed, torch.Tensor) and packed.dtype == torch.int32
    is_plain = getattr(given.activation, "value", given.activation) == "silu" and rows.is_floating_point()
    return is_int4 and is_plain and len(rows) <= ops.MOST_PAIRS and given.group_list_type in (ENDS, COUNTS)


def _experts(given: Any) -> torch.Tensor:
    """[R, H], the experts' outputs of rows [R, H] that are sorted by expert; zeros after the last expert's."""
    rows, weights, groups = given.hidden_states, given.weights, given.group_list
    ends = groups if given.group_list_type == ENDS else groups.cumsum(0)
    # On the card, as a captured graph needs it: an expert's number is how many of them have ended before.
    expert = (torch.arange(len(rows), device=rows.device)[:, None] >= ends).sum(1, dtype=torch.int32)
    chosen = torch.where(expert < len(ends), expert, -1)[:, None]
    return ops.decode_experts_int4(
        rows,
        chosen,
        torch.ones(len(rows), 1, device=rows.device),
        ops.Int4Matrices(weights.w1, weights.w1_scale, weights.w1_offset),
        ops.Int4Matrices(weights.w2, weights.w2_scale, weights.w2_offset),
    )
