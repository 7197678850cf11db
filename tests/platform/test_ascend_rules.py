"""Each rule of Ascend: what breaks it, and that its fix mends it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qerl_rl.config.ascend_schema import VARIABLE_KEYS, AscendConfig
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import Config, LoraConfig, NoiseConfig, QuantConfig, RolloutConfig, SwapConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.platform import ascend_rules
from qerl_rl.platform.ascend_rules import check_rules, mc2_buffer_mb
from qerl_rl.platform.ascend_setting import Setting

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
EAGER = RolloutConfig(tensor_parallel=1, data_parallel=8)
GRAPHS = replace(EAGER, enforce_eager=False)
MANY = replace(EAGER, data_parallel=16, max_sequences=512)


def setting(
    rollout: RolloutConfig = EAGER,
    format: str = "w8a8",
    lora: LoraConfig | None = None,
    swap: SwapConfig | None = None,
    noise: NoiseConfig | None = None,
    ascend: dict[str, object] | None = None,
    environment: dict[str, str] | None = None,
    **changes: object,
) -> Setting:
    """A launch that breaks no rule, but for the changes; `ascend` are keys of rollout.ascend."""
    rollout = replace(rollout, ascend=AscendConfig(**(ascend or {})))
    config = Config(
        rollout=rollout,
        quant=QuantConfig(format=format),
        lora=lora or LoraConfig(),
        swap=swap or SwapConfig(),
        noise=noise or NoiseConfig(),
    )
    return replace(Setting(config, ARCHITECTURE, environment or {}, interfaces=("lo", "eth0")), **changes)


def fault_of(given: Setting) -> ConfigError | None:
    try:
        check_rules(given, lambda key: f"here: {key}")
    except ConfigError as error:
        return error
    return None


W4A8 = {"format": "w4a8"}
BIG = {"HCCL_BUFFSIZE": "4096"}
FUSED = {"rollout": MANY, "environment": BIG}
A3 = {"card": "a3"}
MERGED = LoraConfig(in_rollout="merge")
FROZEN = LoraConfig(experts=False)
FULL = LoraConfig(rank=0)
NOISE = NoiseConfig(enabled=True)
TENSOR = replace(EAGER, tensor_parallel=2, data_parallel=4)
ALONE = replace(EAGER, expert_parallel=False)
SHARED = replace(ARCHITECTURE, shared_expert_width=2048)
EXPANDABLE = {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g,expandable_segments:True"}
STAYS = SwapConfig(release_kv_cache=False, release_weights=False)
# What breaks a rule, what is said of it, the fix, and (what the fix comes to) a launch that breaks none.
CASES: dict[str, tuple[dict, str, str, dict]] = {
    "task_queue": (
        {"rollout": GRAPHS, "environment": {"TASK_QUEUE_ENABLE": "2", "HCCL_OP_EXPANSION_MODE": "AIV"}},
        "TASK_QUEUE_ENABLE=2",
        "to 1",
        {"rollout": GRAPHS, "environment": {"TASK_QUEUE_ENABLE": "1", "HCCL_OP_EXPANSION_MODE": "AIV"}},
    ),
    "task_queue_eager": (
        {"rollout": GRAPHS, "environment": {"TASK_QUEUE_ENABLE": "2"}},
        "TASK_QUEUE_ENABLE=2",
        "enforce_eager to true",
        {"environment": {"TASK_QUEUE_ENABLE": "2"}},
    ),
    "task_queue_value": (
        {"environment": {"TASK_QUEUE_ENABLE": "3"}},
        "TASK_QUEUE_ENABLE=3",
        "0, 1 or 2",
        {"environment": {"TASK_QUEUE_ENABLE": "2"}},
    ),
    "launch_blocking": (
        {"rollout": GRAPHS, "environment": {"ASCEND_LAUNCH_BLOCKING": "1", "HCCL_OP_EXPANSION_MODE": "AIV"}},
        "ASCEND_LAUNCH_BLOCKING=1",
        "to 0",
        {"rollout": GRAPHS, "environment": {"ASCEND_LAUNCH_BLOCKING": "0", "HCCL_OP_EXPANSION_MODE": "AIV"}},
    ),
    "expandable_segments": (
        {"environment": EXPANDABLE},
        "rollout.ascend.sleep_mode=true",
        "take expandable_segments:True out",
        {"environment": {"PYTORCH_NPU_ALLOC_CONF": "page_size:1g"}},
    ),
    "same_as_the_keys": (
        {"environment": {"VLLM_ASCEND_ENABLE_NZ": "1"}},
        "VLLM_ASCEND_ENABLE_NZ=1 contradicts",
        "set rollout.ascend.weight_nz_mode instead",
        {"environment": {"VLLM_ASCEND_ENABLE_NZ": "0"}},
    ),
    "expansion_mode": (
        {"environment": {"HCCL_OP_EXPANSION_MODE": "aiv"}},
        "HCCL_OP_EXPANSION_MODE=aiv",
        "to AIV",
        {"environment": {"HCCL_OP_EXPANSION_MODE": "AIV"}},
    ),
    "buffer_size": ({"rollout": MANY}, "HCCL_BUFFSIZE is not set", "or more", {"rollout": MANY, "environment": BIG}),
    # On Atlas A3 MC2 needs no 16 ranks.
    "buffer_size_a3": (
        {"rollout": replace(EAGER, max_sequences=512), "ascend": A3},
        "too small for 8 ranks",
        "or more",
        {"rollout": replace(EAGER, max_sequences=512), "ascend": A3, "environment": BIG},
    ),
    "buffer_value": ({"environment": {"HCCL_BUFFSIZE": "big"}}, "HCCL_BUFFSIZE=big", "or more", {"environment": BIG}),
    "port": (
        {"environment": {"HCCL_IF_BASE_PORT": "40000"}},
        "HCCL_IF_BASE_PORT=40000",
        "32752 or less",
        {"environment": {"HCCL_IF_BASE_PORT": "32752"}},
    ),
    "port_value": (
        {"environment": {"HCCL_IF_BASE_PORT": "80"}},
        "HCCL_IF_BASE_PORT=80",
        "1024 to",
        {"environment": {"HCCL_IF_BASE_PORT": "61000"}},
    ),
    "network": (
        {"environment": {"HCCL_SOCKET_IFNAME": "enp9"}},
        "HCCL_SOCKET_IFNAME=enp9",
        "one of these",
        {"environment": {"HCCL_SOCKET_IFNAME": "eth0"}},
    ),
    # 1,920 streams / (49 parts x 3 groups) are 13 sizes; 1, 2, 4 and each 8th up to 128 are 19, up to 80 13.
    "stream_budget": (
        {"rollout": GRAPHS},
        "streams for 13",
        "HCCL_OP_EXPANSION_MODE",
        {"rollout": GRAPHS, "environment": {"HCCL_OP_EXPANSION_MODE": "AIV"}},
    ),
    "stream_budget_largest": (
        {"rollout": GRAPHS, "ascend": {"max_capture_size": 88}},
        "14 batch sizes",
        "capture_sizes to 13",
        {"rollout": GRAPHS, "ascend": {"max_capture_size": 80}},
    ),
    "stream_budget_sizes": (
        {"rollout": GRAPHS, "ascend": {"capture_sizes": list(range(1, 15))}},
        "14 batch sizes",
        "13 sizes or fewer",
        {"rollout": GRAPHS, "ascend": {"capture_sizes": list(range(1, 14))}},
    ),
    "installed_engine": (
        {"shadow": "vllm is an editable install of /src"},
        "editable install",
        "uninstall",
        {"shadow": None},
    ),
    "format_runs": ({"format": "nvfp4"}, "quant.format=nvfp4", "w4a16 or w4a8", {"format": "w4a16"}),
    "linear_format": (
        W4A8 | {"linears": frozenset({"w4a8"})},
        "are w4a8",
        "--attention w8a8 or none",
        W4A8 | {"linears": frozenset({"w8a8", "none"})},
    ),
    "cache_block": ({"rollout": replace(EAGER, kv_block_tokens=64)}, "kv_block_tokens=64", "to 128", {}),
    "cache_scales": (
        {"rollout": replace(EAGER, kv_cache_dtype="int8")},
        "no kv_cache_type C8",
        "to auto",
        {"rollout": replace(EAGER, kv_cache_dtype="int8"), "has_cache_scales": True},
    ),
    "sleeping": (
        {"ascend": {"sleep_mode": False}},
        "swap.release_kv_cache=true",
        "swap.release_kv_cache to false",
        {"ascend": {"sleep_mode": False}, "swap": STAYS, "environment": EXPANDABLE},
    ),
    "weight_layout": ({"ascend": {"weight_nz_mode": 1}}, "sleep_mode=true wakes them up", "to 0", {}),
    "weight_layout_merged": (
        {"ascend": {"weight_nz_mode": 2, "sleep_mode": False}, "swap": STAYS, "lora": MERGED},
        "written into them",
        "to 0",
        {"ascend": {"weight_nz_mode": 0, "sleep_mode": False}, "swap": STAYS, "lora": MERGED},
    ),
    "graphs": ({"ascend": {"graph_mode": "full"}}, "captures nothing", "leave the key out", {}),
    "graphs_both": (
        {"rollout": GRAPHS, "ascend": {"capture_sizes": [1, 8], "max_capture_size": 8}},
        "are both set",
        "leave one of them out",
        {"rollout": GRAPHS, "ascend": {"capture_sizes": [1, 8]}},
    ),
    "graphs_sizes": (
        {"rollout": GRAPHS, "ascend": {"capture_sizes": [0, 8]}},
        "sizes below 1",
        "numbers of tokens",
        {"rollout": GRAPHS, "ascend": {"capture_sizes": [8]}},
    ),
    "noise_in_graphs": (
        {"rollout": GRAPHS, "environment": {"HCCL_OP_EXPANSION_MODE": "AIV"}, "noise": NOISE},
        "norms that captured graphs",
        "enforce_eager to true",
        {"noise": NOISE},
    ),
    "fused_products": (
        {"ascend": {"matmul_all_reduce": True}, "lora": FULL},
        "reduces nothing",
        "to false",
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True}, "lora": FULL},
    ),
    "fused_products_adapters": (
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True}},
        "adapters of lora.attention=true",
        "to false",
        {"rollout": TENSOR},
    ),
    "fused_products_scales": (
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True}, "lora": FULL, "linears": frozenset({"w8a8"})},
        "scales of quantized attention",
        "to false",
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True}, "lora": FULL, "linears": frozenset({"none"})},
    ),
    "fused_products_a3": (
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True} | A3, "environment": BIG, "lora": FULL},
        "no such kernel",
        "to false",
        {"rollout": TENSOR, "ascend": A3, "environment": BIG},
    ),
    "fused_products_invariant": (
        {"rollout": TENSOR, "ascend": {"matmul_all_reduce": True, "batch_invariant": True}, "lora": FULL},
        "switches it off",
        "to false",
        {"rollout": TENSOR, "ascend": {"batch_invariant": True}},
    ),
    "scattered_tokens": (
        {"ascend": {"flash_comm": True}},
        "no ranks to scatter over",
        "to false",
        {"rollout": TENSOR, "ascend": {"flash_comm": True}},
    ),
    "scattered_tokens_shared": (
        {"rollout": TENSOR, "ascend": {"flash_comm": True}, "architecture": SHARED},
        "shared experts whole",
        "to false",
        {"rollout": TENSOR, "architecture": SHARED},
    ),
    "fused_dispatch": (
        {"ascend": {"fused_mc2": 1}, "lora": MERGED},
        "here are 8 with 16",
        "to 0",
        FUSED | {"ascend": {"fused_mc2": 1}, "lora": MERGED},
    ),
    "fused_dispatch_a2": (
        FUSED | {"ascend": {"fused_mc2": 1, "card": "a2"}, "lora": MERGED},
        "only Atlas A3",
        "to 0",
        FUSED | {"ascend": {"fused_mc2": 1} | A3, "lora": MERGED},
    ),
    "fused_dispatch_ranks": (
        FUSED | {"rollout": replace(MANY, data_parallel=64), "ascend": {"fused_mc2": 1}, "lora": MERGED},
        "up to 32 ranks",
        "to 0",
        FUSED | {"rollout": replace(MANY, data_parallel=64), "ascend": {"fused_mc2": 2}, "lora": MERGED},
    ),
    "fused_dispatch_format": (
        FUSED | {"ascend": {"fused_mc2": 2}, "lora": MERGED, "format": "w4a16"},
        "is for w8a8",
        "to 0",
        FUSED | {"ascend": {"fused_mc2": 0}, "lora": MERGED, "format": "w4a16"},
    ),
    "fused_dispatch_hierarchy": (
        FUSED | {"ascend": {"fused_mc2": 2, "hierarchical_mc2": True}, "lora": MERGED},
        "exclude each other",
        "to 0",
        FUSED | {"ascend": {"hierarchical_mc2": True}, "lora": MERGED},
    ),
    "fused_dispatch_overlap": (
        FUSED | {"ascend": {"fused_mc2": 1, "overlap_shared_experts": True}, "lora": MERGED},
        "off",
        "overlap_shared_experts to false",
        FUSED | {"ascend": {"fused_mc2": 1}, "lora": MERGED},
    ),
    "fused_adapters": (
        FUSED | {"ascend": {"fused_mc2": 1}},
        "without their adapters",
        "in_rollout to merge",
        FUSED | {"ascend": {"fused_mc2": 1}, "lora": MERGED},
    ),
    "hierarchy": ({"ascend": {"hierarchical_mc2": True}}, "here are 8", "to false", {}),
    "moved_experts": (
        {"ascend": {"dynamic_eplb": True}},
        "served in another",
        "lora.experts to false",
        {"ascend": {"dynamic_eplb": True}, "lora": FROZEN},
    ),
    "moved_experts_merged": (
        {"ascend": {"dynamic_eplb": True}, "lora": MERGED},
        "served in another",
        "leave rollout.ascend.dynamic_eplb out",
        {"lora": MERGED},
    ),
    "moved_experts_several_engines": (
        {"rollout": ALONE, "ascend": {"expert_map_path": "map.json"}, "lora": FROZEN},
        "each of 8 engines",
        "expert_parallel to true",
        {"rollout": ALONE, "lora": FROZEN},
    ),
    "moved_experts_recorded": (
        {"ascend": {"eplb_record_path": "map.json"}, "lora": FROZEN},
        "nothing moves",
        "dynamic_eplb to true",
        {"ascend": {"eplb_record_path": "map.json", "dynamic_eplb": True}, "lora": FROZEN},
    ),
    "moved_experts_redundant": (
        {"ascend": {"dynamic_eplb": True, "eplb_redundant_experts": 4}, "lora": FROZEN},
        "132 experts do not divide over 8",
        "to 0 or 8",
        {"ascend": {"dynamic_eplb": True, "eplb_redundant_experts": 8}, "lora": FROZEN},
    ),
    "expert_map": (
        {"ascend": {"expert_map_path": "map.txt"}, "lora": FROZEN},
        "is no JSON file",
        "a map for 8 ranks",
        {"lora": FROZEN},
    ),
}


@pytest.mark.parametrize(("changes", "problem", "fix", "mended"), CASES.values(), ids=CASES)
def test_what_breaks_a_rule_is_answered_with_a_fix_that_mends_it(
    changes: dict, problem: str, fix: str, mended: dict
) -> None:
    error = fault_of(setting(**changes))
    assert error is not None
    assert problem in error.problem
    assert fix in error.fix
    assert error.where.startswith("here: ")
    assert fault_of(setting(**mended)) is None


def test_attention_of_another_format_is_no_matter_where_its_format_has_linears() -> None:
    assert fault_of(setting(linears=frozenset({"w4a8"}))) is None


@pytest.mark.parametrize("name", VARIABLE_KEYS)
def test_a_variable_may_say_what_its_key_says(name: str) -> None:
    for value in AscendConfig().variables[name], {"false": "0"}.get(AscendConfig().variables[name], "0"):
        assert fault_of(setting(environment={name: value})) is None


def placement(layers: int = 2, ranks: int = 8, experts: int = 128) -> dict:
    """As vllm-ascend records it, experts in order."""
    held = [list(range(experts))[rank * experts // ranks :][: experts // ranks] for rank in range(ranks)]
    devices = [{"device_id": rank, "device_expert": own} for rank, own in enumerate(held)]
    listed = [{"layer_id": layer, "device_count": ranks, "device_list": devices} for layer in range(layers)]
    return {"moe_layer_count": layers, "layer_list": listed}


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        (placement(), None),
        (placement(ranks=16), "is for 16 ranks"),
        (placement(experts=64), "experts 0 to 127 in layer 0"),
        (placement() | {"moe_layer_count": 3}, "counts other layers"),
        ({}, "KeyError"),
        ([], "TypeError"),
    ],
)
def test_an_expert_map_has_to_fit_the_ranks_and_the_model(
    described: object, problem: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(described))
    error = fault_of(setting(ascend={"expert_map_path": str(path)}, lora=FROZEN))
    assert (error and error.problem) is None if problem is None else problem in error.problem


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
        rule.__name__ for rule in ascend_rules.RULES for changes, *_ in CASES.values() if rule(setting(**changes))
    }
    assert broken == {rule.__name__ for rule in ascend_rules.RULES}
