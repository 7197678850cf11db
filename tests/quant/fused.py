"""Checkpoints whose experts of a layer are one tensor, made of those that have one tensor an expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def fused(source: Path, folder: Path) -> Path:
    """As transformers saves its model of `source` where it keeps its own names."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(source, dtype="auto")
    model.save_pretrained(folder, save_original_format=False)
    for name in KEPT:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return folder


def by_columns(source: Path, folder: Path) -> Path:
    """The fused checkpoint `source` with each expert's matrices transposed."""
    tensors = load_file(source / "model.safetensors")
    return written(folder, source, {name: turned(tensor) for name, tensor in tensors.items()})


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """Each matrix of a tensor of three dimensions transposed, any other as it is."""
    return tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor


def written(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A checkpoint of these tensors with the other files of `source` and what is changed of its config.json."""
    folder.mkdir(exist_ok=True)
    for name in KEPT:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    changed = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed, indent=2) + "\n")
    return folder
