"""Random MoE checkpoints in HF format, small enough for a test and lively enough to tell engines apart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qerl_rl.layout.slots import ROUTER_BIAS
from qerl_rl.make_model.characters import character_tokenizer
from qerl_rl.make_model.minicpm import MINICPM, mixtral_to_minicpm

_FAMILIES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "phimoe": (PhimoeConfig, PhimoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}


NO_AUXILIARY_LOSS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@dataclass(frozen=True)
class MoeSizes:
    """Sizes of a small MoE model; `tied`, `norm_topk_prob` and `shared_expert_width` where the family knows them."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    """Qwen3-MoE and Mixtral only; Qwen2-MoE has hidden / heads."""
    experts: int = 8
    top_k: int = 2
    expert_width: int = 64
    shared_expert_width: int = 96
    norm_topk_prob: bool = True
    tied: bool = False
    dense_layers: int = 1
    """DeepSeek only, as what follows: the first layers have no experts."""
    query_rank: int = 24
    """Width that queries are compressed to; 0: they are not."""
    key_value_rank: int = 32
    nope_head_dim: int = 32
    rope_head_dim: int = 16
    value_head_dim: int = 24
    groups: int = 4
    """Of experts, two of which a token may choose from; 1: no groups."""
    routed_scaling: float = 1.5
    yarn: bool = False
    """Positions beyond a quarter of max_length turn slower."""
    vocabulary: int = 0
    """Tokens of the embedding; 0: as many as the tokenizer knows."""
    max_length: int = 512


def build_moe(family: str, sizes: MoeSizes, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreTrainedModel:
    """A float32 model of `family` (a key of _FAMILIES) with the vocabulary and the ends of `tokenizer`.

    Its weights are HF's usual small ones, drawn by `seed` without touching the caller's random numbers.
    """
    options: dict[str, Any] = {
        "vocab_size": sizes.vocabulary or len(tokenizer),
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "num_experts_per_tok": sizes.top_k,
        "tie_word_embeddings": sizes.tied,
        "max_position_embeddings": sizes.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family in ("qwen3_moe", "mixtral"):
        options["head_dim"] = sizes.head_dim
    if family in ("mixtral", "phimoe"):
        options |= {"num_local_experts": sizes.experts, "intermediate_size": sizes.expert_width}
    else:
        options |= {
            "num_experts": sizes.experts,
            "moe_intermediate_size": sizes.expert_width,
            "intermediate_size": 2 * sizes.expert_width,
            "norm_topk_prob": sizes.norm_topk_prob,
        }
    if family == "qwen2_moe":
        options |= {"shared_expert_intermediate_size": sizes.shared_expert_width, "qkv_bias": True}
    if family == "phimoe":
        options |= _phimoe_options(sizes)
    if family.startswith("deepseek"):
        options |= _deepseek_options(family, sizes)
    config_class, model_class = _FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**options))
    return model.eval()


def _phimoe_options(sizes: MoeSizes) -> dict[str, Any]:
    """As the published model."""
    pairs = sizes.hidden // sizes.heads // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": sizes.max_length,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [2.0 + pair for pair in range(pairs)],
        "short_mscale": 1.2,
        "long_mscale": 1.3,
    }
    biases = {"attention_bias": True, "lm_head_bias": True}
    return {
        **biases,
        "rope_parameters": rope,
        "max_position_embeddings": 4 * sizes.max_length,
    }


def _deepseek_options(family: str, sizes: MoeSizes) -> dict[str, Any]:
    """As published models of the family route; norm_topk_prob is V3's."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if sizes.yarn:
        original = sizes.max_length // 4
        # Unequal scales show where one is taken for the other.
        scales = {"mscale": 1.0, "mscale_all_dim": 0.7}
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original, **scales}
        rope |= {"beta_fast": 32, "beta_slow": 1}
    method = "group_limited_greedy" if sizes.groups > 1 else "greedy"
    return {
        "num_key_value_heads": sizes.heads,
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 2,
        "first_k_dense_replace": sizes.dense_layers,
        "q_lora_rank": sizes.query_rank or None,
        "kv_lora_rank": sizes.key_value_rank,
        "qk_nope_head_dim": sizes.nope_head_dim,
        "qk_rope_head_dim": sizes.rope_head_dim,
        "v_head_dim": sizes.value_head_dim,
        "n_group": sizes.groups,
        "topk_group": min(2, sizes.groups),
        "routed_scaling_factor": sizes.routed_scaling,
        "rope_parameters": rope,
        # transformers' V3 needs no word for how it chooses; vLLM does.
        **({"topk_method": method, "norm_topk_prob": False} if family == "deepseek_v2" else NO_AUXILIARY_LOSS),
    }


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draw every weight anew, so that differences between engines show.

    Router logits have a standard deviation near 2 (few near-ties), token logits near 2.5 (entropy well above 0 and well
    below uniform), norms and biases differ from 1 and 0, and the residual stream neither grows nor vanishes.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        center, deviation = 0.0, 1.0 / math.sqrt(parameter.shape[-1])
        if name.endswith("norm.weight"):
            center, deviation = 1.0, 0.1
        elif name.endswith(".bias"):
            deviation = 0.2
        elif name.endswith(("mlp.gate.weight", "mlp.router.weight", "shared_expert_gate.weight")):
            deviation = 2.0 / math.sqrt(hidden)
        elif name.endswith("lm_head.weight") or (name.endswith("embed_tokens.weight") and tied):
            deviation = 2.5 / math.sqrt(hidden)
        elif name.endswith("embed_tokens.weight"):
            deviation = 1.0
        elif tied and name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            # Otherwise the last token's own embedding outweighs the layers and the model repeats it.
            deviation *= 2.0
        parameter.copy_(center + deviation * torch.randn(parameter.shape, generator=generator))
    for name, buffer in model.named_buffers():
        if name.endswith(ROUTER_BIAS):
            # Scores lie between 0 and 1: it changes the choice of many tokens and decides none alone.
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write model, tokenizer and generation_config.json (which ends an answer at <eos>) in HF format as `dtype`."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith(ROUTER_BIAS)}
    model.to(dtype)
    for name, bias in biases.items():
        # As in published checkpoints, whatever the type of the rest.
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its class's new name, which transformers 4 (beside vLLM-Ascend) does not know.
    tokenizer_config = folder / "tokenizer_config.json"
    entries = json.loads(tokenizer_config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer_config.write_text(json.dumps(entries, indent=2) + "\n")


def save_random_checkpoint(
    folder: Path, family: str, sizes: MoeSizes | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A random checkpoint of `family` with the character tokenizer, the same files for the same arguments."""
    tokenizer = character_tokenizer()
    model = build_moe("mixtral" if family == MINICPM else family, sizes or MoeSizes(), tokenizer)
    randomize(model, seed)
    save_model(model, tokenizer, folder, dtype)
    if family == MINICPM:
        mixtral_to_minicpm(folder)
    if family == "phimoe":
        # As published: by transformers' own name vLLM takes its generic model, whose experts no adapter reaches.
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["PhiMoEForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
