"""What happens around vLLM: its environment, the patches, and what is refused before it is imported."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qerl_rl.config.ascend_schema import AscendConfig
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RolloutConfig
from qerl_rl.platform.device import DEVICES
from qerl_rl.rollout import environment as setup
from qerl_rl.rollout import vllm_patches
from qerl_rl.rollout.environment import configure_environment
from qerl_rl.rollout.limits import check_expert_sizes
from qerl_rl.rollout.vllm_engine import end_of_sequence_tokens, sample_seed
from tests.ranks import run_ranks

SIZES = [3, 0, 5]


def _parts(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    rows = SIZES[rank]
    return [
        torch.randn(rows, 6, generator=generator).bfloat16(),
        torch.rand(rows, 2, generator=generator),
        torch.randint(0, 99, (rows, 2), generator=generator, dtype=torch.int32),
    ]


def _communicate() -> dict[str, Any]:
    from qerl_rl.rollout.vllm_patches import _all_gatherv, _reduce_scatterv

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = types.SimpleNamespace(device_group=dist.group.WORLD, world_size=3, rank_in_group=rank)
    whole = torch.arange(8.0)[:, None].expand(8, 4) * (rank + 1)
    return {
        "gathered": [tensor.tolist() for tensor in _all_gatherv(group, _parts(rank), 0, SIZES)],
        "scattered": _reduce_scatterv(group, whole, 0, SIZES)[:, 0].tolist(),
        "equal": _all_gatherv(group, torch.full((2, 1), float(rank)))[:, 0].tolist(),
    }


def _changed_vllm() -> str:
    configure_environment()
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    from qerl_rl.rollout.vllm_patches import apply_patches

    del _CPUSHMDistributed.make_group_name
    try:
        apply_patches()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_tokens_of_unequal_ranks_are_gathered_and_their_sums_handed_back() -> None:
    results = run_ranks(_communicate, 3)
    gathered = [torch.cat(tensors).tolist() for tensors in zip(*map(_parts, range(3)), strict=True)]
    rows = torch.arange(8.0).mul(6).split(SIZES)
    for rank, result in enumerate(results):
        assert result["gathered"] == gathered
        assert result["scattered"] == rows[rank].tolist()
        assert result["equal"] == [0, 0, 1, 1, 2, 2]


def test_a_patch_that_no_longer_applies_says_so() -> None:
    assert "_CPUSHMDistributed.make_group_name" in run_ranks(_changed_vllm, 1)[0]


def test_environment_keeps_the_users_log_level_and_refuses_to_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = dict(os.environ, VLLM_LOGGING_LEVEL="INFO", VLLM_CPU_KVCACHE_SPACE="4")
    environment.pop("TORCHDYNAMO_DISABLE", None)
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    with pytest.raises(RuntimeError, match="TORCHDYNAMO_DISABLE"):
        configure_environment()
    monkeypatch.delitem(sys.modules, "vllm")
    configure_environment()
    assert environment["VLLM_LOGGING_LEVEL"] == "INFO"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment


@pytest.mark.parametrize("eager", [True, False])
def test_keys_of_rollout_ascend_become_variables_on_npus_alone(eager: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = RolloutConfig(enforce_eager=eager, ascend=AscendConfig(fused_mc2=2, dynamic_eplb=True))
    for name in ("cpu", "npu"):
        environment: dict[str, str] = {}
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(setup, "detect", lambda name=name: DEVICES[name])
        monkeypatch.delitem(sys.modules, "vllm", raising=False)
        monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
        configure_environment(rollout)
        # Graphs of NPUs are what the compiler cuts out; a CPU has none.
        assert ("TORCHDYNAMO_DISABLE" in environment) == (name == "cpu" or eager)
        assert environment.get("VLLM_ASCEND_ENABLE_FUSED_MC2") == ("2" if name == "npu" else None)
        assert environment.get("DYNAMIC_EPLB") == ("true" if name == "npu" else None)
        assert (rollout.ascend.variables.items() <= environment.items()) == (name == "npu")


@pytest.mark.parametrize(("card", "column"), [("A2", "910"), ("A3", "910"), ("A5", "a5")])
def test_npus_are_told_from_cpus_and_get_their_own_patches(
    card: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = types.SimpleNamespace(A2="A2", A3="A3", A5="A5")
    modules = {
        "vllm": {},
        "vllm.platforms": {"current_platform": types.SimpleNamespace(device_type="npu")},
        "vllm_ascend": {},
        "vllm_ascend.utils": {"AscendDeviceType": kinds, "get_ascend_device_type": lambda: card},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert vllm_patches.platform_name() == column
    assert vllm_patches.unlink_message_queues_early in vllm_patches.PATCHES[column]
    assert vllm_patches.cpu_experts_honour_expert_map not in vllm_patches.PATCHES[column]


def test_expert_sizes_the_kernel_cannot_do_are_refused_with_the_fix(tmp_path: Path) -> None:
    def write(hidden: int, width: int) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({"hidden_size": hidden, "moe_intermediate_size": width}))
        return tmp_path

    split = RolloutConfig(tensor_parallel=2, data_parallel=1, expert_parallel=False)
    check_expert_sizes(write(64, 64), split)
    check_expert_sizes(write(64, 96), RolloutConfig(tensor_parallel=2, data_parallel=1))
    with pytest.raises(ConfigError, match="expert_parallel to true"):
        check_expert_sizes(write(64, 96), split)
    with pytest.raises(ConfigError, match="multiples of 32"):
        check_expert_sizes(write(48, 64), RolloutConfig())


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert end_of_sequence_tokens(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert end_of_sequence_tokens(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert end_of_sequence_tokens(tmp_path) == [5, 7]


def test_neighbouring_groups_share_no_sample_seed() -> None:
    seeds = {sample_seed(seed, index) for seed in range(50) for index in range(16)}
    assert len(seeds) == 50 * 16
    assert max(seeds) < 2**63
