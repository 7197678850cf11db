"""Each rule of Ascend: what breaks it, and that its fix mends it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config, LoraConfig, QuantConfig, RolloutConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.platform import ascend_rules
from qerl_rl.platform.ascend_rules import Setting, check_rules, mc2_buffer_mb

ARCHITECTURE = MoeArchitecture(
    family="qwen3_moe",
    layers=48,
    hidden_size=2048,
    attention_heads=32,
    key_value_heads=4,
    head_dim=128,
    experts=128,
    experts_per_token=8,
    expert_width=768,
    shared_expert_width=0,
    vocabulary_size=151936,
    max_positions=40960,
    norm_eps=1e-6,
    rope_theta=1e6,
    normalized_top_k=True,
    qk_norm=True,
    qkv_bias=False,
    tied_embeddings=False,
)
NEEDED = {"VLLM_ASCEND_ENABLE_NZ": "0"}
EAGER = RolloutConfig(tensor_parallel=1, data_parallel=8)
GRAPHS = replace(EAGER, enforce_eager=False)
MANY = replace(EAGER, data_parallel=16, max_sequences=512)


def setting(rollout: RolloutConfig = EAGER, format: str = "w8a8", **changes: object) -> Setting:
    """A launch that breaks no rule, but for the changes; `environment` comes on top of what is needed."""
    environment = NEEDED | changes.pop("environment", {})
    lora = changes.pop("lora", LoraConfig())
    config = Config(rollout=rollout, quant=QuantConfig(format=format), lora=lora)
    return replace(Setting(config, ARCHITECTURE, environment, interfaces=("lo", "eth0")), **changes)


def fault_of(given: Setting) -> ConfigError | None:
    try:
        check_rules(given, lambda key: f"here: {key}")
    except ConfigError as error:
        return error
    return None


W4A8 = {"format": "w4a8"}
FUSED = {"VLLM_ASCEND_ENABLE_FUSED_MC2": "1"}
BIG = {"HCCL_BUFFSIZE": "4096"}
MERGED = LoraConfig(in_rollout="merge")
CASES = {
    "task_queue": ({"rollout": GRAPHS, "environment": {"TASK_QUEUE_ENABLE": "2"}}, "TASK_QUEUE_ENABLE", "to 1"),
    "task_queue_value": ({"environment": {"TASK_QUEUE_ENABLE": "3"}}, "TASK_QUEUE_ENABLE=3", "0, 1 or 2"),
    "expandable_segments": (
        {"environment": {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g,expandable_segments:True"}},
        "swap.release_kv_cache=true",
        "take expandable_segments:True out",
    ),
    "engine_version": ({"environment": {"VLLM_USE_V1": "0"}}, "VLLM_USE_V1=0", "to 1"),
    "weight_layout": ({"environment": {"VLLM_ASCEND_ENABLE_NZ": "1"}}, "VLLM_ASCEND_ENABLE_NZ=1", "to 0"),
    "expansion_mode": ({"environment": {"HCCL_OP_EXPANSION_MODE": "aiv"}}, "HCCL_OP_EXPANSION_MODE=aiv", "to AIV"),
    "format_runs": ({"format": "nvfp4"}, "quant.format=nvfp4", "w4a16 or w4a8"),
    "attention_format": (W4A8 | {"attention": frozenset({"w4a8"})}, "attention is w4a8", "--attention w8a8 or none"),
    "fused_dispatch": ({"environment": FUSED}, "VLLM_ASCEND_ENABLE_FUSED_MC2=1", "to 0"),
    "fused_adapters": ({"rollout": MANY, "environment": FUSED | BIG}, "without their adapters", "in_rollout to merge"),
    "balancing": ({"environment": {"DYNAMIC_EPLB": "true"}}, "DYNAMIC_EPLB=true", "to false"),
    "buffer_size": ({"rollout": MANY}, "HCCL_BUFFSIZE is not set", "or more"),
    "buffer_value": ({"environment": {"HCCL_BUFFSIZE": "big"}}, "HCCL_BUFFSIZE=big", "or more"),
    "port": ({"environment": {"HCCL_IF_BASE_PORT": "40000"}}, "HCCL_IF_BASE_PORT=40000", "32752 or less"),
    "port_value": ({"environment": {"HCCL_IF_BASE_PORT": "80"}}, "HCCL_IF_BASE_PORT=80", "1024 to"),
    "network": ({"environment": {"HCCL_SOCKET_IFNAME": "enp9"}}, "HCCL_SOCKET_IFNAME=enp9", "one of these"),
    # 1,920 streams / (49 parts x 3 groups) are 13 sizes; 1, 2, 4 and each 8th up to 128 are 19.
    "stream_budget": ({"rollout": GRAPHS}, "streams for 13", "HCCL_OP_EXPANSION_MODE"),
    "installed_engine": ({"shadow": "vllm is an editable install of /src"}, "editable install", "uninstall"),
}


@pytest.mark.parametrize(("changes", "problem", "fix"), CASES.values(), ids=CASES)
def test_what_breaks_a_rule_is_answered_with_its_fix(changes: dict, problem: str, fix: str) -> None:
    error = fault_of(setting(**changes))
    assert error is not None
    assert problem in error.problem
    assert fix in error.fix
    assert error.where.startswith("here: ")


AIV = {"HCCL_OP_EXPANSION_MODE": "AIV"}
MENDED = {
    "nothing_set": {},
    "task_queue": {"rollout": GRAPHS, "environment": {"TASK_QUEUE_ENABLE": "1"} | AIV},
    "task_queue_eager": {"environment": {"TASK_QUEUE_ENABLE": "2"}},
    "expandable_segments": {"environment": {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}},
    "format_runs": {"format": "w4a16"},
    "attention_format": W4A8 | {"attention": frozenset({"w8a8", "none"})},
    "attention_of_another_format": {"attention": frozenset({"w4a8"})},
    "fused_dispatch": {"rollout": MANY, "environment": FUSED | BIG, "lora": MERGED},
    "balancing": {"environment": {"DYNAMIC_EPLB": "true"}, "lora": MERGED},
    "buffer_size": {"rollout": MANY, "environment": BIG},
    "port": {"environment": {"HCCL_IF_BASE_PORT": "32752"}},
    "port_above": {"environment": {"HCCL_IF_BASE_PORT": "61000"}},
    "network": {"environment": {"HCCL_SOCKET_IFNAME": "eth0"}},
    "stream_budget_aiv": {"rollout": GRAPHS, "environment": AIV},
    # 1, 2, 4 and each 8th up to 80: 13.
    "stream_budget_small": {"rollout": replace(GRAPHS, max_sequences=80)},
}


@pytest.mark.parametrize("changes", MENDED.values(), ids=MENDED)
def test_the_fix_mends_it(changes: dict) -> None:
    assert fault_of(setting(**changes)) is None


def test_weights_in_nz_layout_are_the_default_and_have_to_be_switched_off() -> None:
    error = fault_of(replace(setting(), environment={}))
    assert error is not None
    assert "VLLM_ASCEND_ENABLE_NZ is not set" in error.problem


def test_the_buffer_that_is_named_as_needed_is_enough_and_one_less_is_not() -> None:
    needed = mc2_buffer_mb(ARCHITECTURE, 16, 512)
    # 8 experts x 512 tokens x 16 ranks x 4,608 bytes there, 8 x 512 x 4,096 bytes back, twice.
    assert needed == -(-2 * (8 * 512 * 16 * 4608 + 8 * 512 * 4096) // 2**20)
    assert fault_of(setting(rollout=MANY, environment={"HCCL_BUFFSIZE": str(needed)})) is None
    error = fault_of(setting(rollout=MANY, environment={"HCCL_BUFFSIZE": str(needed - 1)}))
    assert error is not None
    assert f"{needed} or more" in error.fix


def test_every_rule_has_a_case_that_breaks_it() -> None:
    broken = {
        rule.__name__ for rule in ascend_rules.RULES for changes, _, _ in CASES.values() if rule(setting(**changes))
    }
    assert broken == {rule.__name__ for rule in ascend_rules.RULES}
