"""DeepSeek's layouts against the models that vLLM and Megatron build: names and shapes of every parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qerl_rl.config.schema import TrainConfig
from qerl_rl.layout.architecture import MoeArchitecture
from qerl_rl.layout.blocks import ParallelSizes
from qerl_rl.layout.engine import EngineLayout
from qerl_rl.layout.train import TrainLayout
from tests.model import harness
from tests.ranks import RankPool, free_port, run_engines

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "intermediate_size": 160,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
Shapes = dict[str, tuple[int, ...]]


def _parameters(folders: list[Path]) -> list[Shapes]:
    from qerl_rl.rollout.environment import configure_environment

    configure_environment()
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    torch.set_default_dtype(torch.bfloat16)
    found = []
    for folder in folders:
        config = EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
        with set_current_vllm_config(config):
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, f"tcp://127.0.0.1:{free_port()}", 0, "gloo")
                initialize_model_parallel(1, 1)
            parameters = initialize_model(vllm_config=config).named_parameters()
        # vLLM 0.32 keeps experts in a module of their own.
        found.append({name.replace(".routed_experts", ""): tuple(each.shape) for name, each in parameters})
    return found


def _first_layer(folders: list[Path]) -> list[Shapes]:
    """A dense layer as Megatron's own specification has it (experts are this project's)."""
    harness.start(TrainConfig())
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    spec = get_gpt_layer_local_spec(qk_layernorm=True, multi_latent_attention=True, normalization="RMSNorm")
    # It has no weights, and the one of this specification takes no heads of unequal widths.
    spec.submodules.self_attention.submodules.core_attention = IdentityOp
    found = []
    for folder in folders:
        sizes = json.loads((folder / "config.json").read_text())
        config = MLATransformerConfig(
            num_layers=1,
            hidden_size=sizes["hidden_size"],
            num_attention_heads=sizes["num_attention_heads"],
            ffn_hidden_size=sizes["intermediate_size"],
            q_lora_rank=sizes["q_lora_rank"],
            kv_lora_rank=sizes["kv_lora_rank"],
            qk_head_dim=sizes["qk_nope_head_dim"],
            qk_pos_emb_head_dim=sizes["qk_rope_head_dim"],
            v_head_dim=sizes["v_head_dim"],
            normalization="RMSNorm",
            gated_linear_unit=True,
            add_bias_linear=False,
            use_cpu_initialization=True,
        )
        layer = build_module(spec, config=config, layer_number=1)
        found.append({f"decoder.layers.0.{name}": tuple(each.shape) for name, each in layer.named_parameters()})
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Queries through a low rank, and straight."""
    made = []
    for q_lora_rank in (24, None):
        folder = tmp_path / str(q_lora_rank)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | {"q_lora_rank": q_lora_rank}))
        made.append(folder)
    return made


def test_names_and_shapes_are_those_of_megatrons_layer(folders: list[Path], one_rank: RankPool) -> None:
    [found] = one_rank(_first_layer, folders)
    for folder, shapes in zip(folders, found, strict=True):
        planned = TrainLayout(MoeArchitecture.from_folder(folder), ParallelSizes(), 1).local_shapes(0)
        assert {name: shape for name, shape in planned.items() if ".layers.0." in name} == shapes


def test_names_and_shapes_are_those_of_vllms_model(folders: list[Path]) -> None:
    [found] = run_engines(_parameters, 1, folders)
    for folder, shapes in zip(folders, found, strict=True):
        assert EngineLayout(MoeArchitecture.from_folder(folder), 1, 1, False).local_shapes(0) == shapes
