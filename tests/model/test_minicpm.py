"""MiniCPM-MoE computes what a Mixtral does whose weights have its scales folded in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from tests.model import harness
from tests.model.test_hf_parity import hf_logits, hf_model
from tests.ranks import RankPool


def folded_mixtral(source: Path, folder: Path) -> Path:
    """The Mixtral that a float checkpoint of MiniCPM-MoE is, with untied embeddings."""
    config = json.loads((source / "config.json").read_text())
    embedding, depth, base = (config.pop(key) for key in ("scale_emb", "scale_depth", "dim_model_base"))
    residual, output = depth / math.sqrt(config["num_hidden_layers"]), base / config["hidden_size"]
    tensors = load_file(source / "model.safetensors")
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    folded = {}
    for name, tensor in tensors.items():
        scale = 1.0
        if name.endswith(("o_proj.weight", "w2.weight")):
            scale = residual
        elif name == "model.embed_tokens.weight":
            scale = embedding
        elif name == "lm_head.weight":
            scale = output
        folded[name.replace(".mlp.", ".block_sparse_moe.")] = tensor * scale
    config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "tie_word_embeddings": False}
    config["num_local_experts"] = config.pop("num_experts")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    folder.mkdir()
    save_file(folded, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def _compare(source: Path, folded: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits [tokens, vocabulary] of ours and of transformers."""
    train = TrainConfig()
    harness.start(train)
    loaded = harness.load(source, train)
    tokens = harness.sequences(loaded.architecture.vocabulary_size)
    return loaded.model(**harness.packed(tokens))[0].numpy(), hf_logits(hf_model(folded), tokens).numpy()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_the_folded_mixtral(
    tied: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path, one_rank: RankPool
) -> None:
    source = tiny_checkpoint("minicpm", layers=3, tied=tied)
    [(found, expected)] = one_rank(_compare, source, folded_mixtral(source, tmp_path / "folded"))
    cosines = (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert cosines.min() >= 0.9999
    np.testing.assert_allclose(found, expected, atol=1e-4)


SPARE = {
    "model_type": "minicpm",
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 122753,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}


def test_what_a_config_leaves_out_has_its_classes_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SPARE))
    found = MoeArchitecture.from_folder(tmp_path)
    assert (found.rope_theta, found.tied_embeddings, found.head_dim) == (10000.0, True, 64)
    assert found.scales.residual == 1.4 / math.sqrt(40)
    (tmp_path / "config.json").write_text(json.dumps({**SPARE, "num_experts": 0}))
    with pytest.raises(ConfigError, match="num_experts=0"):
        MoeArchitecture.from_folder(tmp_path)
