"""Random checkpoints that many tests share, built once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qerl_rl.make_model.random_model import MoeSizes, save_random_checkpoint
from qerl_rl.quant.quantize import quantize_checkpoint
from tests.quant.fused import by_columns, fused
from tests.ranks import RankPool

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(family, dtype="float32", seed=0, **sizes)` -> folder of a random HF checkpoint.

    Families: qwen3_moe, qwen2_moe (shared expert, qkv bias, tied embeddings unless tied=False), mixtral. `sizes` are
    the fields of MoeSizes (layers=2, norm_topk_prob=False, ...). Calls with equal arguments get the same folder: don't
    write into it.
    """
    built: dict[tuple, Path] = {}

    def build(family: str, dtype: str = "float32", seed: int = 0, **sizes: int | bool) -> Path:
        sizes = {"tied": family == "qwen2_moe"} | sizes
        key = (family, dtype, seed, *sorted(sizes.items()))
        if key not in built:
            folder = tmp_path_factory.mktemp(family)
            built[key] = save_random_checkpoint(folder, family, MoeSizes(**sizes), dtype=DTYPES[dtype], seed=seed)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_quantized(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`tiny_quantized(source, format, **options)` -> folder of the twin of `source` (of `tiny_checkpoint`).

    `options` are those of quantize_checkpoint.
    """
    built: dict[tuple, Path] = {}

    def build(source: Path, format: str, **options: Any) -> Path:
        key = (source, format, *sorted(options.items()))
        if key not in built:
            built[key] = tmp_path_factory.mktemp(f"{source.name}_{format}")
            quantize_checkpoint(source, built[key], format, **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def tiny_w8a8(tiny_checkpoint: Callable[..., Path], tiny_quantized: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny_w8a8(family, ...)` -> folder of the W8A8 twin of `tiny_checkpoint(family, ...)`."""
    return lambda *arguments, **sizes: tiny_quantized(tiny_checkpoint(*arguments, **sizes), "w8a8")


@pytest.fixture(scope="session")
def tiny_fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_fused(source, columns=False)` -> folder of `source` (of `tiny_checkpoint`) with fused experts.

    As transformers saves them; columns: each matrix transposed.
    """
    built: dict[tuple, Path] = {}

    def build(source: Path, *, columns: bool = False) -> Path:
        if (source, columns) not in built:
            folder = tmp_path_factory.mktemp(f"{source.name}_fused")
            built[source, columns] = by_columns(build(source), folder) if columns else fused(source, folder)
        return built[source, columns]

    return build


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    """`one_rank(function, *args)` -> [what it returned], in a process that stays."""
    with RankPool(1) as pool:
        yield pool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """`two_ranks(function, *args)` -> what it returned on each of two ranks, in processes that stay."""
    with RankPool(2) as pool:
        yield pool
