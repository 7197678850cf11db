"""A small launch file in MindSpeed-RL's form, which tests change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from qerl_rl.config.loader import LoadedConfig, load_config
from qerl_rl.config.mindspeed import Translation, translate

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 16,
    "num_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_token_dispatcher_type": "alltoall_seq",
}


def grpo() -> dict:
    """The sections of a launch file for 16 cards, anew for each caller to change."""
    return {
        "defaults": [{"model": ["small_moe"]}],
        "megatron_training": {
            "model": "small_moe",
            "stage": "ray_grpo",
            "use_flash_attn": True,
            "bf16": True,
            "sequence_parallel": True,
            "tokenizer_name_or_path": "some/folder",
            "global_batch_size": 32,
            "seq_length": 48,
            "train_iters": 20,
            "data_path": "some/prompts.jsonl",
            "seed": 7,
        },
        "actor_config": {
            "model": "small_moe",
            "micro_batch_size": 2,
            "tensor_model_parallel_size": 4,
            "expert_model_parallel_size": 2,
            "lr": 1e-6,
            "lr_decay_style": "constant",
            "weight_decay": 0.1,
        },
        "rl_config": {
            "mini_batch_size": 16,
            "n_samples_per_prompt": 8,
            "max_prompt_length": 24,
            "init_kl_coef": 0.001,
            "verifier_function": ["acc", "format"],
            "verifier_weight": [1.0, 0.5],
            "blocking": True,
            "actor_resource": {"num_npus": 16},
        },
        "generate_config": {
            "infer_tensor_parallel_size": 2,
            "max_num_seqs": 8,
            "max_model_len": 48,
            "max_num_batched_tokens": 128,
            "sampling_config": {"max_tokens": 24, "temperature": 1.0, "top_k": -1, "logprobs": 1},
        },
    }


def write(folder: Path, sections: dict, model: dict | None = None) -> Path:
    """Write that launch file with its model file into `folder`/configs; returns its path."""
    configs = folder / "configs"
    (configs / "model").mkdir(parents=True, exist_ok=True)
    model_file = {"small_moe": MODEL | (model or {})}
    (configs / "model" / "small_moe.yaml").write_text(yaml.safe_dump(model_file, sort_keys=False))
    path = configs / "grpo_small.yaml"
    path.write_text(yaml.safe_dump(sections, sort_keys=False))
    return path


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedConfig]:
    """`load(sections, *overrides, model={...})` -> the launch file with these sections, read."""

    def write_and_load(sections: dict, *overrides: str, model: dict | None = None) -> LoadedConfig:
        return load_config(write(tmp_path, sections, model), overrides)

    return write_and_load


@pytest.fixture
def translated(tmp_path: Path) -> Callable[[dict], Translation]:
    """`translated(sections)` -> what they mean, which is quicker than a whole configuration."""

    def write_and_translate(sections: dict) -> Translation:
        path = write(tmp_path, sections)
        return translate(path, OmegaConf.load(path), ())

    return write_and_translate
