"""The Megatron model computes what transformers computes from the same checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.quant.checkpoint import CheckpointReader, ShardWriter
from tests.model import harness
from tests.ranks import RankPool

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Qwen3-MoE, top-k probabilities not normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "Qwen2-MoE, tied embeddings": ("qwen2_moe", {}),
    "Qwen2-MoE, top-k probabilities not normalized": ("qwen2_moe", {"norm_topk_prob": False, "tied": False}),
    "Mixtral": ("mixtral", {}),
    # Three experts out of two groups of two: the three best of all are often in three.
    "DeepSeek-V2": ("deepseek_v2", {"top_k": 3}),
    "DeepSeek-V2-Lite, YaRN": ("deepseek_v2", {"groups": 1, "query_rank": 0, "yarn": True}),
    "DeepSeek-V3, YaRN": ("deepseek_v3", {"top_k": 3, "yarn": True}),
    "DeepSeek-V3, no groups, queries in one projection": ("deepseek_v3", {"groups": 1, "query_rank": 0}),
}
PHI = {"Phi-3.5-MoE": ("phimoe", {})}
"""Apart from the others, since its weights depend on which experts would have been chosen."""
LORA = LoraConfig(rank=4, alpha=8.0)


@dataclass
class Comparison:
    """Logits [tokens, vocabulary], float32."""

    packed: np.ndarray
    separate: np.ndarray
    transformers: np.ndarray


def hf_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_logits(model: Any, tokens: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(sequence[None]).logits[0] for sequence in tokens])


def export(loaded: harness.Loaded, source: Path, folder: Path, *, merge_adapters: bool) -> None:
    """Write the export as a checkpoint that transformers loads."""
    from qerl_rl.model.weight_map import export_hf

    writer = ShardWriter(folder)
    for name, tensor in export_hf(loaded.model, loaded.architecture, merge_adapters=merge_adapters):
        writer.add(name, tensor.clone())
    writer.finish()
    shutil.copy(source / "config.json", folder / "config.json")


def dequantize(reader: CheckpointReader, source: Path, folder: Path) -> Path:
    """Write the weights that a quantized checkpoint stands for, in float32; `source`: its unquantized twin."""
    writer = ShardWriter(folder)
    for name in reader.weights():
        writer.add(name, reader.weight(name))
    writer.finish()
    shutil.copy(source / "config.json", folder / "config.json")
    return folder


@torch.no_grad()
def _compare(folder: Path) -> Comparison:
    train = TrainConfig()
    harness.start(train)
    loaded = harness.load(folder, train)
    tokens = harness.sequences(loaded.architecture.vocabulary_size)
    return Comparison(
        loaded.model(**harness.packed(tokens))[0].numpy(),
        torch.cat([loaded.model(**harness.packed([sequence]))[0] for sequence in tokens]).numpy(),
        hf_logits(hf_model(folder), tokens).numpy(),
    )


def _compare_all(folders: dict[str, Path]) -> dict[str, Comparison]:
    return {case: _compare(folder) for case, folder in folders.items()}


@pytest.fixture(scope="module")
def comparisons(tiny_checkpoint: Callable[..., Path], one_rank: RankPool) -> dict[str, Comparison]:
    folders = {case: tiny_checkpoint(family, **sizes) for case, (family, sizes) in (CASES | PHI).items()}
    return one_rank(_compare_all, folders)[0]


def _cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return (found * expected).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("case", [*CASES, *PHI])
def test_logits_equal_transformers_at_every_position(case: str, comparisons: dict[str, Comparison]) -> None:
    found = comparisons[case]
    assert _cosines(found.packed, found.transformers).min() >= 0.9999
    np.testing.assert_allclose(found.packed, found.transformers, atol=1e-4)


@pytest.mark.parametrize("case", [*CASES, *PHI])
def test_packed_sequences_do_not_see_each_other(case: str, comparisons: dict[str, Comparison]) -> None:
    np.testing.assert_allclose(comparisons[case].packed, comparisons[case].separate, atol=1e-5)


def _quantized_with_adapters(folder: Path, float_folder: Path, scratch: Path) -> dict[str, Any]:
    """A quantized model with random adapters: its logits, loss and gradients, and those of its merged HF export."""
    train = TrainConfig()
    harness.start(train)
    from qerl_rl.model.lora import adapters_disabled, gather_adapters

    plain = harness.load(folder, train)
    loaded = harness.load(folder, train, LORA)
    tokens = harness.sequences(plain.architecture.vocabulary_size)
    arguments = harness.packed(tokens)
    found: dict[str, Any] = {}
    with torch.no_grad():
        dequantized = hf_model(dequantize(plain.reader, float_folder, scratch / "dequantized"))
        found["dequantized"] = hf_logits(dequantized, tokens).numpy()
        found["base"] = plain.model(**arguments)[0].numpy()
        found["fresh"] = loaded.model(**arguments)[0].numpy()
        harness.set_random_adapters(loaded)
        found["adapted"] = loaded.model(**arguments)[0].numpy()
        with adapters_disabled(loaded.model):
            found["disabled"] = loaded.model(**arguments)[0].numpy()
        found["adapted again"] = loaded.model(**arguments)[0].numpy()
    export(loaded, float_folder, scratch, merge_adapters=True)
    merged = hf_model(scratch)
    logits = hf_logits(merged, tokens)
    found["merged"] = logits.detach().numpy()
    labels = torch.cat(tokens).roll(-1)
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    adapters = gather_adapters(loaded.model, loaded.architecture)
    found["expected"] = _adapter_gradients(merged, adapters, LORA.alpha / LORA.rank)
    harness.loss_and_gradients(loaded, tokens)
    found["gradients"] = {name: tensor.numpy() for name, tensor in harness.summed_gradients(loaded).items()}
    return found


def _adapter_gradients(merged: Any, adapters: dict[str, torch.Tensor], scaling: float) -> dict[str, np.ndarray]:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, with dL/dW of the merged weights from transformers."""
    expected = {}
    for name in [name.removesuffix("lora_A") for name in adapters if name.endswith("lora_A")]:
        layer = merged.model.layers[int(name.split(".")[2])]
        attention, experts = layer.self_attn, getattr(layer.mlp, "experts", None)
        parent, _, module = name.rstrip(".").rpartition(".")
        if module == "gate_up_proj":
            gated = merged.get_submodule(parent)
            gradient = torch.cat([gated.gate_proj.weight.grad, gated.up_proj.weight.grad])
        elif module in ("qkv_proj", "w13", "w2"):
            gradient = {
                "qkv_proj": lambda a=attention: torch.cat([getattr(a, f"{x}_proj").weight.grad for x in "qkv"]),
                "w13": lambda e=experts: e.gate_up_proj.grad,
                "w2": lambda e=experts: e.down_proj.grad,
            }[module]()
        else:
            gradient = merged.get_submodule(name.rstrip(".")).weight.grad
        expected[f"{name}lora_A"] = (scaling * adapters[f"{name}lora_B"].mT @ gradient).numpy()
        expected[f"{name}lora_B"] = (scaling * gradient @ adapters[f"{name}lora_A"].mT).numpy()
    return expected


STORED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "W8A8": ("qwen3_moe", "w8a8", {}),
    "W8A8, shared experts": ("qwen2_moe", "w8a8", {}),
    "W8A8, Mixtral": ("mixtral", "w8a8", {}),
    "W4A16": ("qwen3_moe", "w4a16", {"group_size": 32}),
    "W4A16, scales of rows": ("mixtral", "w4a16", {"group_size": -1}),
    "W4A8": ("mixtral", "w4a8", {"group_size": 64}),
    "NVFP4": ("qwen2_moe", "nvfp4", {}),
    "MXFP4": ("qwen3_moe", "mxfp4", {}),
    "MXFP8": ("qwen2_moe", "mxfp8", {}),
    "W8A8, DeepSeek-V3": ("deepseek_v3", "w8a8", {}),
    "W8A8, DeepSeek-V2": ("deepseek_v2", "w8a8", {}),
    "W8A8, Phi-3.5-MoE": ("phimoe", "w8a8", {}),
    "W4A16 experts, the rest W8A8, one layer bf16": (
        "qwen2_moe",
        "w4a16",
        {"group_size": 32, "attention": "w8a8", "keep_layers": (0,)},
    ),
}
"""Family, format of the experts, and other options of quantize_checkpoint."""


@pytest.fixture(scope="module", params=STORED)
def adapted(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., Path],
    tiny_quantized: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    one_rank: RankPool,
) -> dict[str, Any]:
    family, format, options = STORED[request.param]
    source = tiny_checkpoint(family, layers=2)
    folders = tiny_quantized(source, format, **options), source
    return one_rank(_quantized_with_adapters, *folders, tmp_path_factory.mktemp("merged"))[0]


def test_fresh_and_disabled_adapters_give_the_base_bit_for_bit(adapted: dict[str, Any]) -> None:
    np.testing.assert_array_equal(adapted["fresh"], adapted["base"])
    np.testing.assert_array_equal(adapted["disabled"], adapted["base"])
    np.testing.assert_array_equal(adapted["adapted again"], adapted["adapted"])
    assert abs(adapted["adapted"] - adapted["base"]).max() > 0.1


def test_quantized_base_equals_transformers_on_the_dequantized_weights(adapted: dict[str, Any]) -> None:
    assert _cosines(adapted["base"], adapted["dequantized"]).min() >= 0.9999
    np.testing.assert_allclose(adapted["base"], adapted["dequantized"], atol=1e-4)


def test_merged_export_in_transformers_equals_base_plus_adapters(adapted: dict[str, Any]) -> None:
    np.testing.assert_allclose(adapted["merged"], adapted["adapted"], atol=2e-4)


def test_adapter_gradients_equal_those_of_the_merged_model_in_transformers(adapted: dict[str, Any]) -> None:
    assert adapted["gradients"].keys() == adapted["expected"].keys()
    for name, expected in adapted["expected"].items():
        assert abs(expected).max() > 0, name
        np.testing.assert_allclose(adapted["gradients"][name], expected, atol=1e-4 * abs(expected).max(), err_msg=name)
