"""The launch files of real models pass the dry run on folders with the models' own config.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import launch
from qerl_rl.config.schema import Config
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.parts import LatentAttention
from trainer import ascend

CONFIGS = Path(__file__).parents[2] / "configs"
FAMILIES = {
    "qwen3": "qwen3_moe",
    "qwen2": "qwen2_moe",
    "qwen15": "qwen2_moe",
    "mixtral": "mixtral",
    "deepseek": "deepseek_v3",
}
SHARED_WIDTHS = {"qwen2_57b_a14b": 20480, "qwen15_moe_a27b": 5632}
RECIPES = {
    "grpo_qwen3_30b_a3b_16npu": ("qwen3_30b_a3b", "16 = tensor 4 x pipeline 1 x data 4; experts over 8 x tensor 1"),
    "grpo_qwen3_30b_a3b_8npu": ("qwen3_30b_a3b", "8 = tensor 2 x pipeline 1 x data 4; experts over 4 x tensor 1"),
    "grpo_qwen3_235b_a22b_128npu": (
        "qwen3_235b_a22b",
        "128 = tensor 4 x pipeline 2 x data 16; experts over 16 x tensor 1",
    ),
    "grpo_qwen2_57b_a14b_16npu": ("qwen2_57b_a14b", "16 = tensor 4 x pipeline 1 x data 4; experts over 8 x tensor 1"),
    "grpo_qwen15_moe_a27b_4npu": ("qwen15_moe_a27b", "4 = tensor 2 x pipeline 1 x data 2; experts over 4 x tensor 1"),
    "grpo_deepseek_v3_128npu": ("deepseek_v3", "256 = tensor 4 x pipeline 8 x data 8; experts over 32 x tensor 1"),
    "grpo_mixtral_8x7b_8npu": ("mixtral_8x7b", "8 = tensor 4 x pipeline 1 x data 2; experts over 8 x tensor 1"),
}
# The data sets and chat templates of the recipes are not here.
HERE = "data.train_path=arithmetic data.subset= data.prompt_field=prompt data.answer_after= data.chat_template=false"


def model_file(name: str) -> dict:
    return yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())[name]


def hf_config(name: str) -> dict:
    """The config.json that a model file describes, with the names of its family."""
    sizes, family = model_file(name), FAMILIES[name.partition("_")[0]]
    config = {
        "model_type": family,
        "hidden_act": "silu",
        "num_hidden_layers": sizes["num_layers"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["ffn_hidden_size"],
        "num_attention_heads": sizes["num_attention_heads"],
        "num_key_value_heads": sizes.get("num_query_groups", sizes["num_attention_heads"]),
        "num_experts_per_tok": sizes["moe_router_topk"],
        "vocab_size": sizes["padded_vocab_size"],
        "max_position_embeddings": sizes["max_position_embeddings"],
        "rms_norm_eps": sizes["norm_epsilon"],
        "rope_theta": sizes["rotary_base"],
        "tie_word_embeddings": not sizes["untie_embeddings_and_output_weights"],
    }
    if family == "deepseek_v3":
        return config | deepseek_config(sizes)
    if family == "mixtral":
        return config | {"num_local_experts": sizes["num_experts"]}
    config |= {
        "num_experts": sizes["num_experts"],
        "moe_intermediate_size": sizes["moe_ffn_hidden_size"],
        "norm_topk_prob": sizes["norm_topk_prob"],
    }
    if family == "qwen3_moe":
        return config | {"head_dim": sizes["kv_channels"]}
    return config | {"shared_expert_intermediate_size": SHARED_WIDTHS[name], "qkv_bias": sizes["add_qkv_bias"]}


def deepseek_config(sizes: dict) -> dict:
    names = {
        "n_routed_experts": "num_experts",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "qk_nope_head_dim": "qk_head_dim",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",
        "n_group": "moe_router_num_groups",
        "topk_group": "moe_router_group_topk",
        "scoring_func": "moe_router_score_function",
        "routed_scaling_factor": "moe_router_topk_scaling_factor",
    }
    alike = ["q_lora_rank", "kv_lora_rank", "v_head_dim", "first_k_dense_replace", "n_shared_experts", "norm_topk_prob"]
    rope = {
        "type": sizes["rope_scaling_type"],
        "factor": sizes["rope_scaling_factor"],
        "original_max_position_embeddings": sizes["rope_scaling_original_max_position_embeddings"],
        "mscale": sizes["rope_scaling_mscale"],
        "mscale_all_dim": sizes["rope_scaling_mscale_all_dim"],
        **{name: sizes[name] for name in ("beta_fast", "beta_slow")},
    }
    method = "noaux_tc" if sizes["moe_router_enable_expert_bias"] else "none"
    config = {name: sizes[key] for name, key in (names | dict(zip(alike, alike, strict=True))).items()}
    return config | {"topk_method": method, "rope_scaling": rope}


@pytest.fixture
def stand_in(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """`stand_in(name)` -> a folder with that model's config.json, a tokenizer and no weights."""

    def make(name: str) -> Path:
        shutil.copytree(tiny_checkpoint("qwen3_moe"), tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*"))
        (tmp_path / name / "config.json").write_text(json.dumps(hf_config(name)))
        return tmp_path / name

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_passes_the_dry_run_on_its_model(
    recipe: str, stand_in: Callable, tmp_path: Path, monkeypatch, capsys
) -> None:
    ports = tmp_path / "ports"
    ports.write_text("32768\t60999\n")
    monkeypatch.setattr(ascend, "_EPHEMERAL_PORTS", ports)
    monkeypatch.setattr(ascend, "shadowed", lambda name: None)
    name, layout = RECIPES[recipe]
    overrides = [f"model.path={stand_in(name)}", f"run.output_dir={tmp_path}/run", "run.steps=1", *HERE.split()]
    assert launch.main(["--config", str(CONFIGS / f"{recipe}.yaml"), "--dry-run", *overrides]) == 0
    printed = capsys.readouterr().out
    assert layout in printed
    assert "weights" in printed
    assert "not checked" in printed
    # From the file in configs/envs/ that it stands on.
    assert "HCCL_IF_BASE_PORT: '23456'" in printed
    assert "card: a" in printed


def test_every_recipe_and_model_file_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*npu.yaml")} == set(RECIPES)
    assert {path.stem for path in CONFIGS.glob("model/*.yaml")} == {name for name, _ in RECIPES.values()}


def parameters(architecture: MoeArchitecture) -> int:
    """All of a model's weights, from its sizes (biases and norms too)."""
    hidden, experts = architecture.hidden_size, architecture.experts
    attention = 2 * hidden * (architecture.query_size + architecture.key_value_size) + 2 * hidden
    if architecture.latent:
        attention = latent_attention(architecture, architecture.latent) + 2 * hidden
    if architecture.qkv_bias:
        attention += architecture.query_size + 2 * architecture.key_value_size
    if architecture.qk_norm:
        attention += 2 * architecture.head_dim
    mixture = 3 * hidden * architecture.expert_width * experts + hidden * experts
    if architecture.shared_expert_width:
        mixture += 3 * hidden * architecture.shared_expert_width + hidden * architecture.shared_expert_gate
    if architecture.routing.has_bias:
        mixture += experts
    dense = 3 * hidden * architecture.dense_width
    embeddings = architecture.vocabulary_size * hidden * (1 if architecture.tied_embeddings else 2)
    mixtures = architecture.layers - architecture.dense_layers
    return (
        architecture.layers * attention + mixtures * mixture + architecture.dense_layers * dense + embeddings + hidden
    )


def latent_attention(architecture: MoeArchitecture, latent: LatentAttention) -> int:
    """Projections of one layer with the norms between them."""
    hidden, heads = architecture.hidden_size, architecture.attention_heads
    assert latent.query_rank is not None
    queries = latent.query_rank * (hidden + 1 + heads * (latent.nope_head_dim + latent.rope_head_dim))
    down = hidden * (latent.key_value_rank + latent.rope_head_dim) + latent.key_value_rank
    up = latent.key_value_rank * heads * (latent.nope_head_dim + latent.value_head_dim)
    return queries + down + up + heads * latent.value_head_dim * hidden


# Billions, from the models' pages and papers.
PUBLISHED = {
    "qwen3_30b_a3b": 30.5,
    "qwen3_235b_a22b": 235.1,
    "qwen2_57b_a14b": 57.4,
    "qwen15_moe_a27b": 14.3,
    "mixtral_8x7b": 46.7,
    # 685 on disk, of which 14 are the layer of multi-token prediction.
    "deepseek_v3": 671.0,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_file_has_as_many_parameters_as_the_model(name: str, stand_in: Callable) -> None:
    assert round(parameters(MoeArchitecture.from_folder(stand_in(name))) / 1e9, 1) == PUBLISHED[name]


def test_without_weights_only_a_dry_run_goes_on(stand_in: Callable, tmp_path: Path, capsys) -> None:
    overrides = [f"model.path={stand_in('qwen3_30b_a3b')}", f"run.output_dir={tmp_path}/run", "train.device=cpu"]
    recipe = str(CONFIGS / "grpo_qwen3_30b_a3b_8npu.yaml")
    assert launch.main(["--config", recipe, *overrides, *HERE.split()]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_the_documents_name_files_and_keys_that_exist() -> None:
    for name in ("ascend.md", "mindspeed_rl.md"):
        text = (CONFIGS.parent / "docs" / name).read_text()
        for path in re.findall(r"--config (configs/\S+_(?:npu|cpu)\.yaml|configs/\S+npu\.yaml)", text):
            assert (CONFIGS.parent / path).is_file(), path
        keys = re.findall(r"(?<![\w.])([a-z]+)\.([a-z_]+)=", text)
        unknown = [f"{section}.{key}" for section, key in keys if not hasattr(getattr(Config(), section), key)]
        assert keys
        assert unknown == []
