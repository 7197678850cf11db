"""What the engine can't run, found out from the files alone (nothing here imports vLLM)."""

from __future__ import annotations

import json
from pathlib import Path

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.schema import RolloutConfig
from qerl_rl.quant.modelslim import ModelSlimFormats
from qerl_rl.quant.modelslim_w4a8 import W4A8Dynamic
from qerl_rl.rollout.load_plan import ASCEND, LoadPlan

NPU_PLATFORMS = ("910", "a5")
"""Columns of quant/platforms.py that vllm-ascend runs."""
CPU_LATENT = (512, 64)
"""kv_lora_rank and qk_rope_head_dim of vLLM's CPU_MLA and AMX_MLA backends (their head size 576)."""
TILE = 32
"""vLLM's int8 CPU expert kernel works on tiles of this many rows and columns, attention on blocks of as many tokens."""


def check_engine(plan: LoadPlan, rollout: RolloutConfig) -> None:
    """Raise ConfigError for what the engine of this plan's platform can't run."""
    if plan.platform == "cpu":
        check_expert_sizes(plan.reader.path, rollout)
        check_latent_width(plan.reader.path)
    check_kv_cache(rollout, on_npu=plan.platform in NPU_PLATFORMS)
    check_groups(plan, rollout)
    check_scales_of_rows(plan, rollout)


def check_kv_cache(rollout: RolloutConfig, *, on_npu: bool) -> None:
    """Raise ConfigError for a KV cache that no kernel reads."""
    key, wanted = "rollout.kv_cache_dtype", rollout.kv_cache_dtype
    if wanted != "auto" and on_npu != (wanted == "int8"):
        place, others = ("Ascend", "int8") if on_npu else ("a CPU or with CUDA", "fp8")
        raise ConfigError(f"{key}={wanted} has no kernel on {place}.", fix=f"set {key} to auto or {others}")
    key, size = "rollout.kv_block_tokens", rollout.kv_block_tokens
    if not on_npu and size % TILE:
        raise ConfigError(f"{key}={size} is no multiple of {TILE}.", fix=f"set {key} to {-(-size // TILE) * TILE}")


def check_expert_sizes(model_path: str | Path, rollout: RolloutConfig) -> None:
    """Raise ConfigError where a rank's share of an expert does not fill the tiles of the int8 CPU kernel."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if config["hidden_size"] % TILE or width % TILE:
        raise ConfigError(
            f"{model_path} has hidden size {config['hidden_size']} and expert width {width}.",
            fix=f"use a model where both are multiples of {TILE}",
        )
    if not rollout.expert_parallel and width % (TILE * rollout.tensor_parallel):
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} cuts experts of width {width} into parts that are no "
            f"multiples of {TILE}.",
            fix="set rollout.expert_parallel to true (whole experts on each rank)",
        )


def check_latent_width(model_path: str | Path) -> None:
    """Raise ConfigError for latent attention that vLLM's CPU kernels were not compiled for."""
    config = json.loads((Path(model_path) / "config.json").read_text())
    found = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if found[0] is not None and found != CPU_LATENT:
        raise ConfigError(
            f"kv_lora_rank + qk_rope_head_dim = {found[0]} + {found[1]}: the engine's CPU kernels have latents of "
            f"{CPU_LATENT[0]} + {CPU_LATENT[1]} only, those of DeepSeek-V2 and V3.",
            fix="use a model with these sizes, or run the engine on NPUs",
            where=str(Path(model_path) / "config.json"),
        )


def check_groups(plan: LoadPlan, rollout: RolloutConfig) -> None:
    """Raise ConfigError where tensor parallel cuts through groups of weights that share a scale."""
    ranks, folder = rollout.tensor_parallel, plan.reader.path
    config = json.loads((folder / "config.json").read_text())
    values = config.get("v_head_dim") or config.get("head_dim")
    head_dim = values or config["hidden_size"] // config["num_attention_heads"]
    cut = {"self_attn.o_proj": config["num_attention_heads"] * head_dim}
    if not rollout.expert_parallel:
        cut[".experts.0."] = config.get("moe_intermediate_size") or config["intermediate_size"]
    for part, width in cut.items():
        sizes = {run.group_size for name in plan.names() if part in name and (run := plan.engine_format(name))} - {0}
        wrong = next((size for size in sizes if width // ranks % size), None)
        if wrong:
            raise ConfigError(
                f"rollout.tensor_parallel={ranks} cuts rows of {width} weights through groups of {wrong}.",
                fix=f"set rollout.tensor_parallel to a divisor of {width // wrong}"
                + (", or rollout.expert_parallel to true" if part != "self_attn.o_proj" else ""),
                where=str(folder / "config.json"),
            )


def check_scales_of_rows(plan: LoadPlan, rollout: RolloutConfig) -> None:
    """Raise ConfigError where vLLM would leave scales of experts unloaded.

    msmodelslim's W4A8 in groups has scales of rows [N, 1] besides, which vLLM 0.23 (fused_moe/layer.py, `_load_w2`)
    cuts by columns for tensor-parallel ranks, as it cuts those of groups: nothing is left for any rank.
    """
    if plan.platform not in ASCEND or rollout.tensor_parallel == 1 or rollout.expert_parallel:
        return
    formats = (plan.engine_format(name) for name in plan.names() if ".experts.0." in name)
    if any(isinstance(format, W4A8Dynamic) and format.group_size for format in formats):
        raise ConfigError(
            f"experts of msmodelslim's W4A8 in groups don't load with rollout.tensor_parallel="
            f"{rollout.tensor_parallel}.",
            fix="set rollout.expert_parallel to true, or quantize with --group-size -1",
            where=str(plan.reader.path / ModelSlimFormats.file_name),
        )
