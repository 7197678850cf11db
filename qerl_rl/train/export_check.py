"""An export against the model it came from, name by name: a tensor that is lost or superfluous is found here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qerl_rl.layout.slots import ROUTER_BIAS
from qerl_rl.quant.checkpoint import CheckpointReader, read_config

EXPORTED_DTYPE, ROUTER_BIAS_DTYPE = "BF16", "F32"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that older checkpoints store though the config determines them."""


class ExportError(RuntimeError):
    """The export is not the source model's set of tensors; the message names the first that differs."""


def check_merged(folder: Path, source: Path) -> None:
    """Compare the safetensors in `folder` with the model folder `source`: the same names and shapes, bfloat16.

    Quantized weights count as the one tensor they stand for. What transformers would not load either is not expected:
    the output layer of a model with tied embeddings, rotary frequencies, the layer of multi-token prediction.
    Raises: ExportError.
    """
    with CheckpointReader(source) as original, CheckpointReader(folder) as written:
        config = read_config(source)
        expected = {name for name in original.weights() if _is_weight(name, config)}
        _same_names(expected, set(written), folder)
        for name in sorted(expected):
            found, needed = written.shape(name), original.weight_shape(name)
            if found != needed:
                raise ExportError(f"{name} in {folder} has shape {found}, not {needed}")
            dtype = ROUTER_BIAS_DTYPE if name.endswith(ROUTER_BIAS) else EXPORTED_DTYPE
            if written.dtype(name) != dtype:
                raise ExportError(f"{name} in {folder} is {written.dtype(name)}, not {dtype}")


def _is_weight(name: str, config: Mapping[str, Any]) -> bool:
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config["num_hidden_layers"]:
        return False  # Multi-token prediction.
    tied = config.get("tie_word_embeddings", False)
    return not (_RECOMPUTED.search(name) or (tied and name == "lm_head.weight"))


def _same_names(expected: set[str], found: set[str], folder: Path) -> None:
    for problem, names in (("lacks", expected - found), ("has a superfluous", found - expected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ExportError(f"the export in {folder} {problem} {min(names)}{more}")


def check_adapters(tensors: Mapping[str, torch.Tensor], source: Path, rank: int) -> None:
    """Every pair MODULE.lora_A [rank, inputs], MODULE.lora_B [outputs, rank] must fit MODULE.weight [outputs, inputs].

    Args: tensors: by the names of the HF model, as `export.unfused` gives them.
    Raises: ExportError with the first name that has no partner, no weight, or another shape than it needs.
    """
    with CheckpointReader(source) as original:
        weights = set(original.weights())
        for name in sorted(tensors):
            module, _, matrix = name.rpartition(".")
            weight, partner = f"{module}.weight", f"{module}.{'lora_B' if matrix == 'lora_A' else 'lora_A'}"
            if weight not in weights:
                raise ExportError(f"adapter {name} belongs to no tensor: {source} has no {weight}")
            if partner not in tensors:
                raise ExportError(f"adapter {name} has no {partner}")
            outputs, inputs = original.weight_shape(weight)
            needed = (rank, inputs) if matrix == "lora_A" else (outputs, rank)
            if tuple(tensors[name].shape) != needed:
                raise ExportError(f"adapter {name} has shape {tuple(tensors[name].shape)}, not {needed}")
