"""Checkpoints as they come from other tools."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qerl_rl.quant.checkpoint import CheckpointReader, ShardWriter
from qerl_rl.quant.int4 import W4A16Asymmetric


def as_from_awq(symmetric: Path, source: Path, folder: Path) -> Path:
    """What a converted AWQ checkpoint holds: zero points, of eight rows in an int32, and float16 scales."""
    format, writer = W4A16Asymmetric(32, torch.float16), ShardWriter(folder)
    with CheckpointReader(symmetric) as quantized, CheckpointReader(source) as floats:
        for name in floats:
            stored = format.stored(format.quantize(floats.get(name))) if quantized.is_quantized(name) else {}
            for suffix, tensor in (stored or {"": floats.get(name)}).items():
                writer.add(name + suffix, tensor)
    writer.finish()
    config = json.loads((symmetric / "config.json").read_text())
    config["quantization_config"] = format.quantization_config(config["quantization_config"]["ignore"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder
