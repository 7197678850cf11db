"""Small random HF checkpoints, quantized and not, and what the engine's tests run on them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from qerl_rl.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    LoraConfig,
    ModelConfig,
    QuantConfig,
    RolloutConfig,
    TrainConfig,
)
from qerl_rl.platform import detect, prepare_megatron
from qerl_rl.quant.checkpoint import CheckpointReader
from qerl_rl.quant.quantize import quantize_checkpoint
from qerl_rl.train.engine import TrainEngine
from qerl_rl.train.samples import Samples
from tests.ranks import fresh_world

VOCABULARY = 90


def make_checkpoints(folder: Path) -> dict[str, str]:
    """A random Qwen3-MoE in float32 and quantized twins, in folders of `folder`; their paths by quant.format."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder / "full")
    quantize_checkpoint(folder / "full", folder / "w8a8", "w8a8")
    quantize_checkpoint(folder / "full", folder / "w4a16", "w4a16", group_size=-1)
    quantize_checkpoint(folder / "full", folder / "nvfp4", "nvfp4")
    return {"none": str(folder / "full")} | {name: str(folder / name) for name in ("w8a8", "w4a16", "nvfp4")}


def make_config(
    paths: dict[str, str],
    *,
    quant: str = "w8a8",
    workers: int = 1,
    rank: int = 4,
    kl_coefficient: float = 0.0,
    **train: object,
) -> Config:
    """Keywords beyond those named are train.*; `rank` is lora.rank."""
    settings = {"device": "cpu", "micro_batch_tokens": 80, "learning_rate": 3e-3, "recompute": "none", **train}
    return Config(
        cluster=ClusterConfig(workers=workers),
        model=ModelConfig(path=paths[quant], max_length=128),
        quant=QuantConfig(format=quant),
        lora=LoraConfig(rank=rank, alpha=8.0),
        algorithm=AlgorithmConfig(kl_coefficient=kl_coefficient),
        train=TrainConfig(**settings),  # type: ignore[arg-type]
        rollout=RolloutConfig(temperature=0.9),
        checkpoint=CheckpointConfig(keep=2),
    )


def make_samples(count: int = 12, seed: int = 3, shortest: int = 6, longest: int = 30) -> Samples:
    """Random samples of unequal lengths with a column `advantages`."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest, size=count)
    responses = [int(generator.integers(1, length - 2)) for length in lengths]
    return Samples(
        tokens=[generator.integers(0, VOCABULARY, size=length) for length in lengths],
        response_lengths=responses,
        columns={"advantages": [generator.normal(size=length).astype(np.float32) for length in responses]},
    )


def share(samples: Samples, rank: int, size: int) -> Samples:
    """The contiguous part of data-parallel rank `rank` of `size`."""
    bounds = np.linspace(0, len(samples), size + 1).astype(int)
    return samples.select(range(bounds[rank], bounds[rank + 1]))


def policy_gradient(
    log_probs: torch.Tensor, entropy: torch.Tensor, columns: dict[str, torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """- sum of weight * advantage * log-prob, with an entropy bonus so that both scores carry gradients."""
    loss = (weights * (-log_probs * columns["advantages"] - 0.1 * entropy)).sum()
    return loss, {"log_prob": log_probs.detach().sum(), "entropy": entropy.detach().sum()}


def start_engine(config: Config, **arguments: object) -> TrainEngine:
    """An engine in this process, in place of any earlier one: the layout may be another."""
    device = detect(config.train.device)
    prepare_megatron(device)
    fresh_world(device.collective_backend)
    return TrainEngine(config, **arguments)  # type: ignore[arg-type]


def dequantize_folder(paths: dict[str, str], folder: Path) -> None:
    """Write the W8A8 checkpoint with its weights in float32, as transformers loads them without quantization."""
    reader = CheckpointReader(paths["w8a8"])
    tensors = {}
    for name in reader.names():
        if reader.is_quantized(name):
            tensors[name] = reader.get(name).float() * reader.get(f"{name}_scale").float()
        elif not name.endswith("_scale"):
            tensors[name] = reader.get(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(Path(paths["none"]) / "config.json", folder / "config.json")
