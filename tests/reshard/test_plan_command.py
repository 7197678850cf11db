"""`python -m qerl_rl reshard-plan` says what a launch file's swap moves, and starts nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qerl_rl.__main__ import main

TWO_STAGES = ("cluster.workers=4", "train.pipeline_parallel=2", "rollout.tensor_parallel=2", "rollout.data_parallel=2")
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 100,
}


@pytest.fixture
def launch_file(tmp_path: Path) -> Callable[[Path], list[str]]:
    """Arguments of the command for a model's folder."""

    def arguments(model: Path) -> list[str]:
        file = tmp_path / "launch.yaml"
        file.write_text(f"model:\n  path: {model}\ndata:\n  train_path: arithmetic\n")
        return ["reshard-plan", "--config", str(file), "--ranks-per-node", "2"]

    return arguments


def _said(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_adapters_of_a_quantized_base_and_all_weights_are_planned(
    tiny_checkpoint: Callable[..., Path], launch_file: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = launch_file(tiny_checkpoint("qwen3_moe"))
    adapters = _said([*arguments, *TWO_STAGES], capsys)
    assert adapters.startswith("4 ranks, 2 a node: adapters\n")
    weights = _said([*arguments, *TWO_STAGES, "lora.rank=0", "quant.format=w8a8"], capsys)
    assert weights.startswith("4 ranks, 2 a node: all weights, w8a8\n")
    assert main([*arguments, *TWO_STAGES, "--ranks-per-node", "0"]) == 2
    assert "--ranks-per-node 0" in capsys.readouterr().err
    for text in (adapters, weights):
        assert "1.000 of the lower bound" in text
        assert "same node" in text


def test_deepseek_on_stages_of_unequal_length_is_planned(
    tmp_path: Path, launch_file: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK))
    arguments = [*launch_file(tmp_path), *TWO_STAGES, "lora.rank=0", "quant.format=w8a8"]
    assert main(arguments) == 2
    assert "train.pipeline_parallel=2 does not divide the model's 3 layers" in capsys.readouterr().err
    assert "all weights, w8a8" in _said([*arguments, "train.layers_per_stage=2,1"], capsys)
    assert main([*arguments, "train.layers_per_stage=2,2"]) == 2
    assert "train.layers_per_stage=2,2" in capsys.readouterr().err
    assert "adapters" in _said([*arguments, "lora.rank=4", "train.layers_per_stage=2,1"], capsys)
