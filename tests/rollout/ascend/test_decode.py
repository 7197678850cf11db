"""W4A16 experts of a few rows by one kernel, against vllm-ascend's own computation on a layer that it has processed.

Its real methods run here, on a CPU, with its operators by their references, as is ours: the kernel itself is held
against that reference in tests/platform/triton_kernels. Not proved: speed, and captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qerl_rl.platform import ops
from qerl_rl.platform.simulated_npu import operators
from qerl_rl.rollout.ascend import decode
from tests.rollout.ascend import layers, wheel
from tests.rollout.ascend.layers import EXPERT_KINDS, EXPERTS, HIDDEN, WIDTH

MOE = "vllm_ascend.ops.fused_moe"
MODULES = (*wheel.MODULES, f"{MOE}.moe_mlp", f"{MOE}.moe_comm_method")
KIND = EXPERT_KINDS["w4a16"]


def _grouped_matmul(x: Any, weight: Any, *, group_list: torch.Tensor, group_list_type: int, **options: Any) -> Any:
    ends = group_list if group_list_type == decode.ENDS else group_list.cumsum(0)
    options = {name: option for name, option in options.items() if name != "output_dtype"}
    # The simulated operator wants all rows to have a group; of the others the real one writes nothing.
    used = [rows[: int(ends[-1])] for rows in x]
    [found] = operators.grouped_matmul(used, weight, group_list=ends, group_list_type=decode.ENDS, **options)
    return [torch.cat([found, found.new_zeros(len(x[0]) - len(found), found.shape[1])])]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """An importer of vllm-ascend's modules, where few rows of int4 experts go to one kernel."""
    given = wheel.given(KIND.description, wheel.AscendConfig())
    given["torch_npu"] |= {"npu_grouped_matmul": _grouped_matmul, "npu_swiglu": operators.swiglu}
    monkeypatch.setattr(ops, "has_triton_ascend", lambda: True)
    with wheel.wheel(*MODULES, given=given) as load:
        yield load


def _given(layer: torch.nn.Module, rows: int, groups: list[int], kind: int, **changed: Any) -> SimpleNamespace:
    """vllm-ascend's MoEMlpComputeInput of random rows."""
    weights = {"w1_bias": None, "w2_bias": None, "w1_scale_bias": None, "w2_scale_bias": None}
    for short, name in (("w1", "w13"), ("w2", "w2")):
        for suffix, part in (("", "packed"), ("_scale", "scale"), ("_offset", "offset")):
            weights[short + suffix] = getattr(layer, f"{name}_weight_{part}").data
    quant = {"is_quant": True, "is_int_quant": True, "is_mxfp": False, "quant_type": None}
    fields = {
        # vllm-ascend frees it after use.
        "hidden_states": torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows)).bfloat16(),
        "group_list": torch.tensor(groups),
        "group_list_type": kind,
        "weights": SimpleNamespace(**weights),
        "quant": SimpleNamespace(**quant, use_w4a8_per_channel_gmm_swiglu=False),
        **dict.fromkeys(("dynamic_scale", "topk_scales", "lora_context", "expanded_row_idx", "topk_ids")),
        **{"need_trans": False, "dynamic_eplb": False, "fusion": False, "swiglu_limit": 0.0, "activation": "silu"},
    }
    return SimpleNamespace(**(fields | changed))


def _layer(load: Callable[[str], ModuleType]) -> torch.nn.Module:
    layer = layers.experts_of(load, KIND, EXPERTS, WIDTH)
    layers.fill(layer, layers.expert_parts(KIND.format, 1))
    return layer


ROUTES = {
    "counts": (8, [3, 0, 4, 1], decode.COUNTS),
    "ends": (8, [3, 3, 7, 8], decode.ENDS),
    "rows of experts elsewhere": (9, [2, 1, 0, 3], decode.COUNTS),
    "as many rows as it takes": (ops.MOST_PAIRS, [16, 16, 31, 1], decode.COUNTS),
}


@pytest.mark.parametrize("route", ROUTES)
def test_few_rows_get_what_vllm_ascend_computes(load: Callable[[str], ModuleType], route: str) -> None:
    layer, method = _layer(load), load(f"{MOE}.moe_comm_method").MoECommMethod
    original = method._apply_mlp
    calls: list[int] = []
    decode_experts = ops.decode_experts_int4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "decode_experts_int4", lambda x, *rest: calls.append(len(x)) or decode_experts(x, *rest))
        expected, _ = original(None, _given(layer, *ROUTES[route]))
        assert calls == []
        decode.fuse_small_int4_experts()
        found, _ = method._apply_mlp(None, _given(layer, *ROUTES[route]))
    assert calls == [ROUTES[route][0]]
    assert found.dtype == expected.dtype
    # Its weights, its products and what SwiGLU gives are rounded to 8 bits on the way, ours in the end.
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": ops.MOST_PAIRS + 1, "groups": [0, ops.MOST_PAIRS + 1, 0, 0]},
        {"activation": "swiglustep"},
        {"weights": SimpleNamespace(w1=torch.zeros(2, 3), w1_offset=None)},
        {"kind": 2},
    ],
    ids=["more rows", "another activation", "another scheme", "another list of groups"],
)
def test_everything_else_stays_with_vllm_ascend(load: Callable[[str], ModuleType], changed: dict[str, Any]) -> None:
    method = load(f"{MOE}.moe_comm_method").MoECommMethod
    method._apply_mlp = lambda self, given: given
    decode.fuse_small_int4_experts()
    arguments = {"rows": 8, "groups": [3, 0, 4, 1], "kind": decode.COUNTS} | changed
    given = _given(_layer(load), **arguments)
    assert method._apply_mlp(None, given) is given


def test_without_triton_ascend_the_key_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"fused_int4_decode needs triton-ascend"):
        decode.fuse_small_int4_experts()
