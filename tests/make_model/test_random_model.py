"""Random checkpoints are repeatable, load in transformers, and are neither flat nor one-sided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qerl_rl.make_model.random_model import MoeSizes, save_random_checkpoint
from qerl_rl.quant.checkpoint import CheckpointReader

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral")


@pytest.mark.parametrize("family", FAMILIES)
def test_token_and_router_distributions_are_lively(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(family), dtype=torch.float32)
    tokens = torch.randint(4, 100, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(tokens, output_router_logits=True)
    log_probs = outputs.logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    # Uniform over 100 tokens is 4.6 nats.
    assert 1.5 < entropy.mean() < 3.5
    for router_logits in outputs.router_logits:
        assert 1.0 < router_logits.std() < 3.0
        chosen = router_logits.topk(2).indices.flatten().bincount(minlength=8)
        assert (chosen > 0).all()


def test_equal_arguments_give_equal_weights_whatever_the_global_seed(tmp_path: Path) -> None:
    folders = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(folders))
        folders.append(save_random_checkpoint(tmp_path / name, "qwen2_moe", MoeSizes(layers=1), seed=seed))
    first, second, third = (CheckpointReader(folder) for folder in folders)
    assert all(torch.equal(first.get(name), second.get(name)) for name in first)
    assert not torch.equal(first.get("model.norm.weight"), third.get("model.norm.weight"))


def test_sizes_reach_the_checkpoint(tiny_checkpoint: Callable[..., Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint("qwen2_moe", "bfloat16", layers=1, norm_topk_prob=False, experts=4)
    ).config
    assert (config.num_hidden_layers, config.norm_topk_prob, config.num_experts) == (1, False, 4)
    assert config.tie_word_embeddings
    assert config.dtype == torch.bfloat16
    reader = CheckpointReader(tiny_checkpoint("qwen2_moe"))
    assert "lm_head.weight" not in reader
    assert reader.get("model.layers.0.self_attn.q_proj.bias").abs().max() > 0


def test_fixture_builds_each_checkpoint_once(tiny_checkpoint: Callable[..., Path]) -> None:
    assert tiny_checkpoint("mixtral") == tiny_checkpoint("mixtral", "float32", tied=False)
    assert tiny_checkpoint("mixtral") != tiny_checkpoint("mixtral", layers=2)
