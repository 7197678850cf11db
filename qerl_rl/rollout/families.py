"""Model families that vLLM runs in part, found out from config.json alone (nothing here imports vLLM)."""

from __future__ import annotations

from pathlib import Path

from qerl_rl.config.errors import ConfigError
from qerl_rl.layout.routing import SPARSE_MIXER_JITTER
from qerl_rl.quant.checkpoint import read_config

NATIVE = {"phimoe": "PhiMoEForCausalLM"}
"""By model_type, the name in config.json that vLLM's own class goes by, where transformers writes another."""


def check_family(model_path: str | Path) -> None:
    """Raise ConfigError for a model that no engine samples from, or not by the class that weights are moved into."""
    config, where = read_config(Path(model_path)), str(Path(model_path) / "config.json")
    family = config.get("model_type", "")
    if family == "minicpm":
        raise ConfigError(
            "vLLM (0.23 to 0.32) can't sample from MiniCPM-MoE here: it keeps experts as two float tensors, which no"
            " format quantizes and no expert parallelism splits, for a Triton kernel.",
            fix="train it from pairs (algorithm.name=dpo with eval.every=0), without an engine, or use another model",
            where=where,
        )
    jitter = config.get("router_jitter_noise", SPARSE_MIXER_JITTER)
    if family == "phimoe" and jitter != SPARSE_MIXER_JITTER:
        raise ConfigError(
            f"router_jitter_noise={jitter}, but vLLM weighs experts as for {SPARSE_MIXER_JITTER}, whatever config.json"
            " says.",
            fix=f"use a model with router_jitter_noise={SPARSE_MIXER_JITTER}, as the published one",
            where=where,
        )
    native = NATIVE.get(family)
    if native and config.get("architectures") != [native]:
        raise ConfigError(
            f"architectures={config.get('architectures')} makes vLLM take transformers' class for {family}, whose"
            " experts can't be given new weights.",
            fix=f'set "architectures": ["{native}"] in config.json, as the published model has it',
            where=where,
        )
