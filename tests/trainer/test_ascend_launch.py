"""A dry run for Ascend holds the rules of its engine against the launch, from any machine."""

import shutil
from pathlib import Path

import pytest

import launch
from trainer import ascend


@pytest.fixture
def arguments(tmp_path: Path, tiny_w8a8) -> list[str]:
    path = tmp_path / "launch.yaml"
    path.write_text(
        f"run: {{steps: 2, output_dir: {tmp_path}/run}}\n"
        f"model: {{path: {tiny_w8a8('qwen3_moe')}, max_length: 64}}\n"
        "rollout: {max_prompt_tokens: 24, max_response_tokens: 16}\n"
        "data: {train_path: arithmetic}\n"
        "cluster: {environment: {TASK_QUEUE_ENABLE: 2}}\n"
    )
    return ["--config", str(path), "--dry-run"]


def test_the_rules_are_checked_for_npu_and_for_no_other_device(arguments, capsys, monkeypatch) -> None:
    # Whatever this machine's engine is installed as, it is none of Ascend's.
    monkeypatch.setattr(ascend, "shadowed", lambda name: None)
    assert launch.main([*arguments, "train.device=npu"]) == 0
    assert launch.main([*arguments, "train.device=cpu", "rollout.enforce_eager=false"]) == 0
    capsys.readouterr()
    assert launch.main([*arguments, "train.device=npu", "rollout.enforce_eager=false"]) == 2
    said = capsys.readouterr().err
    assert "TASK_QUEUE_ENABLE=2 with rollout.enforce_eager=false" in said
    assert "(command line)" in said
    assert launch.main([*arguments, "train.device=npu", "cluster.environment.HCCL_IF_BASE_PORT=80"]) == 2
    assert "cluster.environment.HCCL_IF_BASE_PORT" in capsys.readouterr().err


def test_a_cache_in_int8_needs_a_checkpoint_with_its_scales(
    arguments, tmp_path, tiny_w8a8, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(ascend, "shadowed", lambda name: None)
    asked = [*arguments, "train.device=npu", "rollout.kv_cache_dtype=int8"]
    assert launch.main(asked) == 2
    assert "no kv_cache_type C8" in capsys.readouterr().err
    folder = tmp_path / "c8"
    shutil.copytree(tiny_w8a8("qwen3_moe"), folder)
    (folder / "quant_model_description.json").write_text('{"kv_cache_type": "C8"}')
    assert ascend._has_cache_scales(folder)
    assert launch.main([*arguments, "train.device=cpu", "rollout.kv_cache_dtype=int8"]) == 2
    assert "rollout.kv_cache_dtype=int8 has no kernel on a CPU" in capsys.readouterr().err


def test_attention_is_read_from_the_checkpoint(tiny_w8a8, tiny_checkpoint) -> None:
    assert ascend._linear_formats(str(tiny_w8a8("qwen3_moe"))) == {"w8a8"}
    assert ascend._linear_formats(str(tiny_checkpoint("qwen3_moe"))) == {"none"}
