"""The trained model for other programs.

FOLDER/hf/                     base + adapters merged, bfloat16, sharded safetensors with config and tokenizer: what
                               transformers and vLLM load (no quantization_config)
FOLDER/adapter/                the adapters alone, as PEFT keeps them (one pair for each Linear of each expert)
FOLDER/adapters.safetensors    the same in the exchange format: what this trainer and its engines load
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qerl_rl.config.schema import LoraConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.slots import ROUTER_BIAS
from qerl_rl.quant.checkpoint import ShardWriter, read_config
from qerl_rl.train.export_check import check_adapters, check_merged

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def write_merged(folder: Path, source: Path, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write `weights` (HF name, full tensor) in bfloat16 with the config and tokenizer of the model folder `source`.

    Raises: ExportError when they are not the source's tensors, name by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The config comes last: a folder without one does not load, so a broken-off export is not mistaken for a model.
    (folder / "config.json").unlink(missing_ok=True)
    writer = ShardWriter(folder)
    for name, tensor in weights:
        # Scores of sigmoid routers differ by less than bfloat16 tells apart.
        writer.add(name, tensor if name.endswith(ROUTER_BIAS) else tensor.to(torch.bfloat16))
    writer.finish()
    check_merged(folder, source)
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copy2(file, folder / file.name)
    config = read_config(source)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_adapters(
    folder: Path,
    adapters: Mapping[str, torch.Tensor],
    *,
    architecture: MoeArchitecture,
    lora: LoraConfig,
    base: str,
) -> None:
    """Write the adapters, in the exchange format, to `folder` as PEFT keeps them. `base` is the base model's folder.

    Raises: ExportError when one of them fits no weight of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = dict(unfused(adapters, architecture))
    check_adapters(parts, Path(base), lora.rank)
    tensors = {f"base_model.model.{name}.weight": tensor.contiguous() for name, tensor in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_config(lora, architecture, base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def unfused(adapters: Mapping[str, torch.Tensor], architecture: MoeArchitecture) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF module + .lora_A or .lora_B, tensor) of every Linear: A [r, inputs], B [outputs, r].

    q, k and v share their A, as do gate and up: each gets a copy.
    """
    gate, up, down = architecture.expert_weight_names
    rows = {"q": architecture.query_size, "k": architecture.key_value_size, "v": architecture.key_value_size}
    for name, tensor in adapters.items():
        module, _, matrix = name.rpartition(".")
        parent, _, kind = module.rpartition(".")
        if kind == "qkv_proj":
            parts = [tensor.clone() for _ in rows] if matrix == "lora_A" else tensor.split(list(rows.values()))
            yield from ((f"{parent}.{key}_proj.{matrix}", part) for key, part in zip(rows, parts, strict=True))
        elif kind == "gate_up_proj":
            parts = [tensor.clone(), tensor.clone()] if matrix == "lora_A" else tensor.chunk(2)
            yield from (
                (f"{parent}.{key}_proj.{matrix}", part) for key, part in zip(("gate", "up"), parts, strict=True)
            )
        elif kind not in ("w13", "w2"):
            yield name, tensor
        else:
            parent = parent.replace(".mlp.", f".{architecture.mlp_name}.")
            for expert, one in enumerate(tensor):
                if kind == "w2":
                    yield f"{parent}.{expert}.{down}.{matrix}", one.clone()
                    continue
                halves = (one.clone(), one.clone()) if matrix == "lora_A" else one.chunk(2)
                for key, part in zip((gate, up), halves, strict=True):
                    yield f"{parent}.{expert}.{key}.{matrix}", part.clone()


def peft_config(lora: LoraConfig, architecture: MoeArchitecture, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json."""
    experts = [f"experts.{e}.{name}" for e in range(architecture.experts) for name in architecture.expert_weight_names]
    shared = [f"{architecture.names.shared_expert}.{name}_proj" for name in ("gate", "up", "down")]
    dense = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [
            *(_attention_modules(architecture) if lora.attention else []),
            *(experts if lora.experts else []),
            *(shared if lora.shared_experts and architecture.shared_expert_width else []),
            *(dense if lora.shared_experts and architecture.dense_layers else []),
        ],
    }


def _attention_modules(architecture: MoeArchitecture) -> list[str]:
    if architecture.latent is None:
        return ["q_proj", "k_proj", "v_proj", "o_proj"]
    queries = ["q_a_proj", "q_b_proj"] if architecture.latent.query_rank else ["q_proj"]
    return [*queries, "kv_a_proj_with_mqa", "o_proj"]
