"""Recomputation, and training without adapters, give the gradients of the plain pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.layout.slots import ROUTER_BIAS
from tests.model import harness
from tests.model.test_hf_parity import hf_logits, hf_model
from tests.ranks import RankPool

ADAPTERS = {
    "all": LoraConfig(rank=4),
    "attention": LoraConfig(rank=4, experts=False, shared_experts=False),
    "experts": LoraConfig(rank=4, attention=False, shared_experts=False),
    "shared experts": LoraConfig(rank=4, attention=False, experts=False),
}
RECOMPUTE = ("none", "full", "selective")

Gradients = dict[str, np.ndarray]


def _recomputed(folder: Path) -> dict[tuple[str, str], tuple[float, Gradients]]:
    found = {}
    for adapters, lora in ADAPTERS.items():
        for recompute in RECOMPUTE:
            train = TrainConfig(recompute=recompute)
            harness.start(train)
            loaded = harness.load(folder, train, lora)
            harness.set_random_adapters(loaded)
            loss = harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
            gradients = harness.summed_gradients(loaded)
            found[adapters, recompute] = loss, {name: tensor.numpy() for name, tensor in gradients.items()}
    return found


def test_recomputation_changes_neither_loss_nor_gradients(tiny_w8a8: Callable[..., Path], one_rank: RankPool) -> None:
    found = one_rank(_recomputed, tiny_w8a8("qwen2_moe", layers=2))[0]
    for adapters in ADAPTERS:
        loss, gradients = found[adapters, "none"]
        assert all(abs(gradient).max() > 0 for gradient in gradients.values())
        for recompute in RECOMPUTE[1:]:
            again, recomputed = found[adapters, recompute]
            assert again == loss
            for name, expected in gradients.items():
                np.testing.assert_array_equal(recomputed[name], expected, err_msg=f"{adapters}, {recompute}: {name}")


def _without_adapters(folder: Path, layouts: dict[str, TrainConfig]) -> dict[str, tuple[float, Gradients]]:
    found = {}
    for name, train in layouts.items():
        harness.start(train)
        from qerl_rl.model.weight_map import export_hf

        loaded = harness.load(folder, train)
        loss = harness.loss_and_gradients(loaded, harness.sequences(loaded.architecture.vocabulary_size))
        harness.replace_weights_by_gradients(loaded)
        exported = export_hf(loaded.model, loaded.architecture)
        # A router's bias does not train.
        gradients = {name: tensor.numpy() for name, tensor in exported if not name.endswith(ROUTER_BIAS)}
        found[name] = loss, gradients
    return found


def _expected_gradients(folder: Path) -> tuple[float, Gradients]:
    """The same loss in transformers, gradients by HF name."""
    model = hf_model(folder)
    tokens = harness.sequences(model.config.vocab_size)
    labels = torch.cat(tokens).roll(-1)
    loss = torch.nn.functional.cross_entropy(hf_logits(model, tokens), labels, reduction="sum")
    loss.backward()
    return float(loss), {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def _unstacked(gradients: Gradients) -> Gradients:
    """transformers holds the experts stacked in memory, but not on disk."""
    found = {}
    for name, gradient in gradients.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            found[name] = gradient
            continue
        for expert, matrix in enumerate(gradient):
            halves = np.split(matrix, 2) if kind == "gate_up_proj" else [matrix]
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            for half, projection in zip(halves, names, strict=True):
                found[f"{prefix}.experts.{expert}.{projection}.weight"] = half
    return found


PHI_ON_DISK = {
    ".mlp.router.": ".mlp.gate.",
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
"""Parts of names of Phi-3.5-MoE's tensors: in memory and on disk."""


def _published(name: str) -> str:
    for here, there in PHI_ON_DISK.items():
        name = name.replace(here, there)
    return name


FAMILIES = [("qwen3_moe", False), ("qwen2_moe", True), ("deepseek_v3", False), ("phimoe", False)]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_all_weights_train_without_adapters(
    family: str, tied: bool, tiny_checkpoint: Callable[..., Path], one_rank: RankPool, two_ranks: RankPool
) -> None:
    folder = tiny_checkpoint(family, layers=2, tied=tied)
    loss, gradients = _expected_gradients(folder)
    layouts = {
        "TP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
        "TP2 EP2": TrainConfig(tensor_parallel=2, expert_parallel=2),
        "PP2": TrainConfig(pipeline_parallel=2),
    }
    found = one_rank(_without_adapters, folder, {"one rank": TrainConfig()})[0]
    first, second = two_ranks(_without_adapters, folder, layouts)
    found |= {name: (max(first[name][0], second[name][0]), first[name][1]) for name in layouts}
    expected = _unstacked(gradients)
    if family == "phimoe":
        expected = {_published(name): gradient for name, gradient in expected.items()}
    for layout, (layout_loss, layout_gradients) in found.items():
        assert layout_loss == pytest.approx(loss, rel=1e-5), layout
        assert layout_gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            tolerance = 1e-4 * abs(gradient).max() + 1e-7
            np.testing.assert_allclose(layout_gradients[name], gradient, atol=tolerance, err_msg=f"{layout}: {name}")


def _cast_scales(folder: Path) -> tuple[bool, set[torch.dtype]]:
    train = TrainConfig()
    harness.start(train)
    model = harness.load(folder, train).model
    scales = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("_scale")}
    model.bfloat16()
    kept = all(torch.equal(scales[name], buffer) for name, buffer in model.named_buffers() if name in scales)
    return kept and bool(scales), {parameter.dtype for parameter in model.parameters()}


def test_casting_the_model_does_not_round_the_scales(tiny_w8a8: Callable[..., Path], one_rank: RankPool) -> None:
    assert one_rank(_cast_scales, tiny_w8a8("qwen2_moe", layers=2))[0] == (True, {torch.bfloat16})
