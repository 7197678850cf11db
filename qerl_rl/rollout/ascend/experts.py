"""Adapters inside the W8A8 experts of a vllm-ascend engine: before SwiGLU, and after the down projection.

vllm-ascend's own LoRA for experts knows unquantized ones on tensor-parallel ranks only (vllm_ascend/lora/fused_moe.py).
All its ways to exchange tokens but the one that fuses everything (fused MC2) hand the sorted tokens of a rank to
`MoECommMethod._apply_mlp`; here it computes the layers that have adapters. Source:
vllm_ascend/ops/fused_moe/moe_comm_method.py and moe_mlp.py of 0.23.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qerl_rl.platform import ops
from qerl_rl.rollout.ascend.rewrite import layout_of

ADAPTED_SCHEME = "AscendW8A8DynamicFusedMoEMethod"
"""Whose experts take adapters."""
ENDS, COUNTS = 0, 1
"""How vllm-ascend says which rows are whose (group_list_type)."""
_MARK = "expert_adapters"
"""The attribute of a layer's first weight, which is all that `_apply_mlp` sees of the layer, with its adapters."""


@dataclass(frozen=True)
class ExpertAdapters:
    """Those of one layer on one rank: float32, the scale inside B.

    gate_up_a [E, rank, hidden], gate_up_b [E, 2 * intermediate, rank], down_a [E, rank, intermediate], down_b [E,
    hidden, rank]. They are read at every call: update them in place.
    """

    gate_up_a: torch.Tensor
    gate_up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor

    def compute(self, given: Any) -> torch.Tensor:
        """What the experts make of a rank's tokens, sorted by expert.

        Args: given: vllm-ascend's MoEMlpComputeInput. hidden_states [T, hidden] are bfloat16, or int8 with
            dynamic_scale float32 [T] where they travelled so: adapters see the rounded ones then.
        Returns: bfloat16 [T, hidden].
        Raises: RuntimeError for an activation other than SwiGLU without a limit.
        """
        if given.swiglu_limit or getattr(given.activation, "value", given.activation) != "silu":
            raise RuntimeError(
                f"adapters inside experts know SwiGLU without a limit, not {given.activation} up to "
                f"{given.swiglu_limit}: set lora.in_rollout to merge"
            )
        weights, ends = given.weights, _ends(given.group_list, given.group_list_type)
        if given.dynamic_scale is None:
            exact, (rows, scale) = given.hidden_states.float(), ops.dynamic_quantize(given.hidden_states)
        else:
            rows, scale = given.hidden_states, given.dynamic_scale
            exact = rows.float() * scale[:, None]
        # The scale came as bfloat16, the kernel before this one wants it as float32.
        w13_scale = weights.w1_scale[0].to(torch.bfloat16)
        gate_up = ops.routed_matmul_int8(rows, scale, weights.w1[0], w13_scale, ends)
        gate_up.add_(_low_rank(exact, self.gate_up_a, self.gate_up_b, ends))
        activated = ops.weighted_swiglu(gate_up, exact.new_ones(len(exact)))
        rows, scale = ops.dynamic_quantize(activated)
        down = ops.routed_matmul_int8(rows, scale, weights.w2[0], weights.w2_scale[0], ends)
        return down.add_(_low_rank(activated.float(), self.down_a, self.down_b, ends))


def _ends(group_list: torch.Tensor, kind: int) -> torch.Tensor:
    if kind not in (ENDS, COUNTS):
        raise RuntimeError(f"vllm-ascend's group_list_type {kind} is not known to qerl_rl/rollout/ascend/experts.py")
    ends = group_list if kind == ENDS else group_list.cumsum(0)
    return ends.to(torch.int64)


def _low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return ops.routed_matmul(ops.routed_matmul(x, a.transpose(1, 2), ends), b.transpose(1, 2), ends)


def adapt_experts(
    layer: Any, gate_up_a: torch.Tensor, gate_up_b: torch.Tensor, down_a: torch.Tensor, down_b: torch.Tensor
) -> None:
    """Make vllm-ascend's expert layer compute with these adapters; see `ExpertAdapters`.

    Raises: RuntimeError where tokens don't pass `_apply_mlp`, or experts move between ranks.
    """
    from vllm_ascend.ascend_config import get_ascend_config

    layout_of(layer)
    if get_ascend_config().enable_fused_mc2:
        raise RuntimeError(
            "fused MC2 leaves adapters inside experts out: set rollout.ascend.fused_mc2 to 0, or lora.in_rollout to "
            "merge"
        )
    _compute_with_adapters()
    setattr(layer.w13_weight, _MARK, ExpertAdapters(gate_up_a, gate_up_b, down_a, down_b))


def _compute_with_adapters() -> None:
    """Replace `_apply_mlp` once; without it, experts compute as if they had no adapters."""
    from vllm_ascend.ops.fused_moe.moe_comm_method import MoECommMethod

    original = MoECommMethod._apply_mlp
    if hasattr(original, "without_adapters"):
        return

    def apply_mlp(method: Any, mlp_compute_input: Any) -> Any:
        weights = mlp_compute_input.weights.w1
        adapters = getattr(weights[0], _MARK, None) if isinstance(weights, list) else None
        if adapters is None:
            return original(method, mlp_compute_input)
        # The second is an event for shared experts to wait for; without one they need not.
        return adapters.compute(mlp_compute_input), None

    apply_mlp.without_adapters = original  # type: ignore[attr-defined]
    MoECommMethod._apply_mlp = apply_mlp
