"""train.mindspeed against MindSpeed's own switches, read in its sources: each has one key, every value it takes, and
either acts or is refused with the reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from qerl_rl.config.bounds import CHOICES
from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.mindspeed_checks import REFUSED, mindspeed_fault
from qerl_rl.config.mindspeed_schema import MindSpeedConfig
from qerl_rl.config.schema import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from qerl_rl.platform import mindspeed_arguments as bridge


@dataclass(frozen=True)
class Switch:
    """file: where MindSpeed's parser gets it. values: all it takes (numbers: those that tell bounds apart)."""

    file: str
    values: tuple[Any, ...] = (False, True)
    default: Any = None


_CONTEXT = "context_parallel/context_parallel_feature.py"
# MindSpeed 2.3.0_core_r0.12.1, mindspeed/features_manager/; where another is named, 26.1.0_core_r0.12.1 has it as well
# as those; megatron: megatron/training/arguments.py of Megatron-LM core_v0.12.1.
SWITCHES = {
    "use_fused_rmsnorm": Switch("megatron_basic/megatron_basic.py"),
    "use_fused_swiglu": Switch("megatron_basic/megatron_basic.py"),
    "use_fused_rotary_pos_emb": Switch("fusions/fused_rope.py"),
    "use_flash_attn": Switch("megatron"),
    "moe_grouped_gemm": Switch("megatron"),
    "use_fused_moe_token_permute_and_unpermute": Switch("fusions/fused_moe_permute.py"),
    "moe_layer_recompute": Switch("megatron"),
    "optimization_level": Switch("megatron_basic/requirements_basic.py", (0, 1, 2), 2),
    "optimizer_selection": Switch(
        "megatron_basic/requirements_basic.py", ("fused_adamw", "fused_torch_adamw", "fused_ema_adamw"), "fused_adamw"
    ),
    "use_ascend_mc2": Switch("tensor_parallel/mc2.py"),
    "moe_tp_extend_ep": Switch("moe/tp_extend_ep.py"),
    "moe_permutation_async_comm": Switch("moe/tp_extend_ep.py"),
    "moe_alltoall_overlap_comm": Switch("moe/moe_alltoall_overlap.py"),
    "moe_allgather_overlap_comm": Switch("moe/moe_allgather_overlap.py"),
    "moe_alltoall_mc2": Switch("26.1.0: moe/moe_alltoall_mc2.py"),
    "moe_fb_overlap": Switch("moe/fb_overlap.py"),
    "moe_zero_memory": Switch("moe/moe_zero_memory.py", ("disable", "level0", "level1"), "disable"),
    "moe_zero_memory_num_layers": Switch("moe/moe_zero_memory.py", (0, 1)),
    "gemm_gradient_accumulation_fusion": Switch("moe/gmm.py"),
    "recompute_activation_function": Switch("recompute/activation_function.py"),
    "recompute_norm": Switch("recompute/norm_function.py"),
    "swap_attention": Switch("memory/swap_attention.py"),
    "swap_optimizer": Switch("optimizer/swap_optimizer_feature.py"),
    "reuse_fp32_param": Switch("memory/reuse_fp32_param.py"),
    "use_ascend_coc": Switch("tensor_parallel/locl_coc.py"),
    "context_parallel_size": Switch("megatron", (1, 2), 1),
    "context_parallel_algo": Switch(
        f"{_CONTEXT}, context_parallel/ulysses_context_parallel.py, context_parallel/adaptive_context_parallel.py; "
        f"26.1.0: {_CONTEXT}",
        (
            "megatron_cp_algo",
            "ulysses_cp_algo",
            "hybrid_cp_algo",
            "hybrid_adaptive_cp_algo",
            "adaptive_cp_algo",
            "kvallgather_cp_algo",
        ),
        "megatron_cp_algo",
    ),
    "use_cp_send_recv_overlap": Switch(_CONTEXT),
    "npu_deterministic": Switch("functional/npu_deterministic.py"),
}
BASE = Config(
    model=ModelConfig(path="model"),
    data=DataConfig(train_path="arithmetic"),
    lora=LoraConfig(rank=0),
    train=TrainConfig(device="npu", tensor_parallel=2),
)
VALUES = [(name, value) for name, switch in SWITCHES.items() for value in switch.values]


def _with(config: Config, **switches: Any) -> Config:
    return replace(config, train=replace(config.train, mindspeed=MindSpeedConfig(**switches)))


def test_every_switch_has_one_key_with_its_values_and_default() -> None:
    assert [field.name for field in fields(MindSpeedConfig)] == list(SWITCHES)
    for field in fields(MindSpeedConfig):
        switch = SWITCHES[field.name]
        assert field.default in switch.values
        assert switch.default is None or field.default == switch.default
        words = CHOICES.get(f"train.mindspeed.{field.name}")
        assert (words is not None) == isinstance(switch.values[0], str)
        assert words is None or set(words) == set(switch.values)


def test_every_switch_is_answered_in_one_way() -> None:
    answered = [*bridge.OPERATORS, *bridge.PASSED_ON, *bridge.MEGATRON, *REFUSED]
    assert sorted(answered) == sorted(SWITCHES)


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_every_value_acts_or_is_refused_with_what_to_do(name: str, value: Any) -> None:
    config = _with(BASE, **{name: value})
    neutral = getattr(MindSpeedConfig, name)
    fault = mindspeed_fault(config)
    if name in REFUSED and value != neutral:
        assert fault is not None
        key, problem, fix = fault
        assert key == f"train.mindspeed.{name}"
        assert REFUSED[name].why in problem
        assert fix
        return
    if value == "fused_ema_adamw":
        assert fault is not None
        return
    assert fault is None
    before, after = (bridge.mindspeed_arguments(each) for each in (BASE, config))
    changes = before != after or bridge.left_out(BASE.train) != bridge.left_out(config.train)
    assert changes == (value != neutral)


@pytest.mark.parametrize(
    ("switches", "changes", "fix"),
    [
        ({"use_ascend_mc2": True}, {"tensor_parallel": 1}, "train.tensor_parallel above 1"),
        ({"moe_layer_recompute": True}, {"recompute": "full"}, "train.recompute to none"),
        ({"optimization_level": 3}, {}, "to 0, 1 or 2"),
        ({"optimizer_selection": "fused_torch_adamw"}, {"device": "cpu"}, "leave train.mindspeed.optimizer"),
        ({"moe_zero_memory": "level2"}, {}, "disable or level0 or level1"),
        ({}, {"recompute_layers": 2}, "train.recompute to full"),
    ],
)
def test_what_does_not_fit_together_is_refused(switches: dict, changes: dict, fix: str) -> None:
    config = replace(BASE, cluster=replace(BASE.cluster, workers=2))
    config = replace(config, train=replace(config.train, **changes, mindspeed=MindSpeedConfig(**switches)))
    with pytest.raises(ConfigError) as caught:
        check_config(config, lambda key: key)
    assert fix in caught.value.fix


def test_mc2_needs_linear_layers_that_are_megatrons() -> None:
    fault = mindspeed_fault(_with(replace(BASE, lora=LoraConfig()), use_ascend_mc2=True))
    assert fault is not None
    assert "lora.rank to 0" in fault[2]


def test_a_provider_for_npus_is_refused_elsewhere() -> None:
    config = replace(BASE, model=replace(BASE.model, provider="mindspeed_llm"))
    assert mindspeed_fault(config) is None
    fault = mindspeed_fault(replace(config, train=dataclasses.replace(config.train, device="cuda")))
    assert fault is not None
    assert fault[0] == "model.provider"
