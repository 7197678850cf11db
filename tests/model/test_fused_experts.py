"""The trainer reads fused experts: the same weights as from one tensor an expert, of them this rank's bytes only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.config.schema import LoraConfig, TrainConfig
from qerl_rl.quant.checkpoint import CheckpointReader
from tests.model import harness
from tests.model.test_hf_parity import hf_logits, hf_model
from tests.ranks import RankPool

LAYOUTS = {
    "EP2": TrainConfig(expert_parallel=2),
    "TP2 ETP2": TrainConfig(tensor_parallel=2, expert_tensor_parallel=2),
}
NOT_SQUARE = {"layers": 2, "expert_width": 96}


def _loaded(folder: Path, train: TrainConfig) -> tuple[dict[str, bytes], int]:
    """This rank's tensors, and the bytes read."""
    harness.start(train)
    loaded = harness.load(folder, train, LoraConfig(rank=2))
    tensors = dict(loaded.model.state_dict()).items()
    # Adapters begin with random numbers.
    held = {
        name: tensor.numpy().tobytes()
        for name, tensor in tensors
        if isinstance(tensor, torch.Tensor) and "lora" not in name
    }
    return held, loaded.reader.bytes_read


def _differences(folders: dict[str, Path], source: Path) -> dict[str, Any]:
    """By layout and folder, the names of tensors that are not those of `source`, and the bytes read of both."""
    found = {}
    for layout, train in LAYOUTS.items():
        expected, needed = _loaded(source, train)
        assert any("experts.w13" in name for name in expected)
        for name, folder in folders.items():
            held, read = _loaded(folder, train)
            unequal = [key for key in expected.keys() | held.keys() if expected.get(key) != held.get(key)]
            found[layout, name] = unequal, read, needed
    return found


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Callable[..., Path], tiny_fused: Callable[..., Path]) -> dict[str, Path]:
    source = tiny_checkpoint("qwen3_moe", **NOT_SQUARE)
    return {"plain": source, "rows": tiny_fused(source), "columns": tiny_fused(source, columns=True)}


def test_a_rank_holds_the_same_weights_and_reads_its_own_experts_bytes(
    folders: dict[str, Path], two_ranks: RankPool
) -> None:
    source = folders["plain"]
    with CheckpointReader(source) as reader:
        sizes = {name: reader.get(name).nbytes for name in reader}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    split = sum(size for name, size in sizes.items() if name.endswith(("_proj.weight", "embed_tokens.weight")))
    split += sizes["lm_head.weight"] - experts
    rest = sum(sizes.values()) - experts - split
    expected = {"EP2": experts // 2 + split + rest, "TP2 ETP2": experts // 2 + split // 2 + rest}
    for rank in two_ranks(_differences, {name: folders[name] for name in ("rows", "columns")}, source):
        for (layout, name), (unequal, read, needed) in rank.items():
            assert unequal == [], (layout, name)
            assert read == needed == expected[layout], (layout, name)


@torch.no_grad()
def _logits(folders: dict[str, Path]) -> dict[str, tuple[Any, Any]]:
    """Ours and those of transformers, which reads the folder itself."""
    train, found = TrainConfig(), {}
    harness.start(train)
    for name, folder in folders.items():
        loaded = harness.load(folder, train)
        tokens = harness.sequences(loaded.architecture.vocabulary_size)
        ours = loaded.model(**harness.packed(tokens))[0]
        found[name] = ours.numpy(), hf_logits(hf_model(folder), tokens).numpy()
    return found


def test_logits_are_those_of_transformers(
    folders: dict[str, Path],
    tiny_checkpoint: Callable[..., Path],
    tiny_fused: Callable[..., Path],
    one_rank: RankPool,
) -> None:
    families = ("mixtral", "phimoe", "deepseek_v3")
    fused = {family: tiny_fused(tiny_checkpoint(family, layers=2)) for family in families}
    fused["qwen3_moe"] = folders["rows"]
    for family, (ours, theirs) in one_rank(_logits, fused)[0].items():
        assert abs(theirs).max() > 0.1
        assert abs(ours - theirs).max() < 1e-4, family
