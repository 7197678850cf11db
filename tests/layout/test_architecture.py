"""config.json of the three families, as transformers 4 and 5 write it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.fit import check_layout

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "intermediate_size": 6144,
    "norm_topk_prob": True,
    "vocab_size": 101,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    "sliding_window": None,
    "use_sliding_window": False,
}


def _read(tmp_path: Path, config: dict[str, Any]) -> MoeArchitecture:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return MoeArchitecture.from_folder(tmp_path)


def test_old_and_new_spellings_mean_the_same(tmp_path: Path) -> None:
    old = {name: value for name, value in QWEN3.items() if name not in ("rope_parameters", "num_local_experts")}
    old |= {"rope_theta": 5e5, "rope_scaling": None, "num_experts": 8}
    assert _read(tmp_path, old) == _read(tmp_path, QWEN3)
    assert _read(tmp_path, QWEN3).rope_theta == 5e5


def test_head_size_follows_from_the_hidden_size_when_the_config_has_none(tmp_path: Path) -> None:
    mixtral = QWEN3 | {"model_type": "mixtral", "head_dim": None, "intermediate_size": 80}
    architecture = _read(tmp_path, mixtral)
    assert (architecture.head_dim, architecture.expert_width, architecture.normalized_top_k) == (8, 80, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
        ({"model_type": "mixtral", "use_sliding_window": ..., "sliding_window": 64}, "sliding_window=64"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "rope_parameters="),
        ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1"),
        ({"vocab_size": ...}, "vocab_size"),
    ],
)
def test_unsupported_settings_are_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    config = {name: value for name, value in (QWEN3 | change).items() if value is not ...}
    with pytest.raises(ConfigError) as caught:
        _read(tmp_path, config)
    assert named in caught.value.problem
    assert caught.value.fix
    assert "config.json" in caught.value.where


def test_sliding_window_as_long_as_the_context_is_full_attention(tmp_path: Path) -> None:
    assert _read(tmp_path, QWEN3 | {"use_sliding_window": True, "sliding_window": 512}).layers == 6


@pytest.mark.parametrize(
    ("train", "named", "fix"),
    [
        (TrainConfig(tensor_parallel=8), "tensor_parallel=8", "1 or 2 or 4"),
        (TrainConfig(pipeline_parallel=4), "pipeline_parallel=4", "1 or 2 or 3"),
        (TrainConfig(pipeline_parallel=2, layers_per_stage="3,4"), "layers_per_stage=3,4", "add up to 6"),
        (TrainConfig(pipeline_parallel=4, layers_per_stage="1,1,2,2"), "different sizes", "first and the last"),
        (TrainConfig(expert_parallel=3), "expert_parallel=3", "1 or 2"),
        (TrainConfig(tensor_parallel=2, sequence_parallel=False), "sequence_parallel=false", "true"),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused_with_the_fix(
    train: TrainConfig, named: str, fix: str, tmp_path: Path
) -> None:
    architecture = _read(tmp_path, QWEN3)
    with pytest.raises(ConfigError) as caught:
        check_layout(architecture, train)
    assert named in caught.value.problem
    assert fix in caught.value.fix


def test_layouts_that_fit_pass(tmp_path: Path) -> None:
    architecture = _read(tmp_path, QWEN3)
    check_layout(architecture, TrainConfig(tensor_parallel=4, expert_parallel=4, token_dispatcher="allgather"))
    check_layout(architecture, TrainConfig(tensor_parallel=2, pipeline_parallel=3, expert_tensor_parallel=2))
