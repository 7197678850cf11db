"""DeepSeek's layout against the model that vLLM itself builds: names and shapes of every parameter."""

from __future__ import annotations

import json
from pathlib import Path

from qerl_rl.layout.deepseek import DeepseekArchitecture
from qerl_rl.layout.engine import EngineLayout
from tests.ranks import free_port, run_engines

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


def test_names_and_shapes_are_those_of_vllms_model(tmp_path: Path) -> None:
    """With queries through a low rank, and straight."""
    folders = []
    for q_lora_rank in (24, None):
        folder = tmp_path / str(q_lora_rank)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | {"q_lora_rank": q_lora_rank}))
        folders.append(folder)
    [found] = run_engines(_parameters, 1, folders)
    for folder, shapes in zip(folders, found, strict=True):
        assert EngineLayout(DeepseekArchitecture.from_folder(folder), 1, 1, False).local_shapes(0) == shapes
