"""A MiniCPM-MoE checkpoint out of a Mixtral's: the same weights under its names, and its scales in config.json.

transformers has no class for it (its code comes with its checkpoints).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

MINICPM = "minicpm"
SCALES = {"scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 64}
"""As strong as the published 12, 1.4 and 256 of 2304 hidden elements are, in a small model."""


def mixtral_to_minicpm(folder: Path) -> None:
    """Rewrite the checkpoint in `folder`, of one safetensors file, in place."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    rope = config.pop("rope_parameters", {})
    config |= {"model_type": MINICPM, "architectures": ["MiniCPMForCausalLM"], **SCALES}
    config |= {"num_experts": config.pop("num_local_experts"), "rope_theta": rope.get("rope_theta", 10000.0)}
    config_file.write_text(json.dumps(config, indent=2) + "\n")
