"""A launch file in MindSpeed-RL's form passes the dry run on a model folder, and says what is different here."""

from pathlib import Path

import pytest
import ray
import yaml

import launch


@pytest.fixture
def launch_file(tmp_path: Path, tiny_w8a8) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tiny.yaml").write_text("tiny:\n  num_layers: 4\n  num_experts: 8\n")
    sections = {
        "defaults": [{"model": ["tiny"]}],
        "megatron_training": {
            "model": "tiny",
            "stage": "ray_dapo",
            "use_flash_attn": True,
            "overlap_grad_reduce": True,
            "tokenizer_name_or_path": str(tiny_w8a8("qwen3_moe")),
            "global_batch_size": 4,
            "train_iters": 2,
            "data_path": "./data",
        },
        "actor_config": {
            "model": "tiny",
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "lr": 1e-6,
            "lr_decay_style": "constant",
            "lora_target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
            "load": "./tiny-tp2-pp1",
            "save": str(tmp_path / "run"),
        },
        "rl_config": {
            "mini_batch_size": 4,
            "n_samples_per_prompt": 4,
            "max_prompt_length": 24,
            "verifier_function": ["acc_for_dapo"],
            "actor_resource": {"num_npus": 2},
        },
        "generate_config": {
            "infer_tensor_parallel_size": 1,
            "enable_expert_parallel": True,
            "infer_expert_parallel_size": 2,
            "max_model_len": 48,
            "sampling_config": {"max_tokens": 16, "temperature": 1.0, "top_k": -1},
        },
    }
    path = tmp_path / "dapo_tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_dry_run_shows_our_keys_and_what_became_of_theirs(launch_file: Path, capsys) -> None:
    assert launch.main(["--config", str(launch_file), "--dry-run", "data.train_path=arithmetic"]) == 0
    printed = capsys.readouterr().out
    # The checkpoint says how it is stored; their files do not.
    assert "format: w8a8" in printed
    assert "acc_for_dapo: 1.0" in printed
    assert "2 = tensor 2 x pipeline 1 x data 1; experts over 1 x tensor 2" in printed
    assert "done differently: actor_config.load=./tiny-tp2-pp1" in printed
    assert "has no effect here: megatron_training.{overlap_grad_reduce}" in printed
    assert "use_flash_attn: true" in printed
    assert not ray.is_initialized()


def test_what_does_not_fit_the_model_is_answered_in_their_words(launch_file: Path, capsys) -> None:
    overrides = ["data.train_path=arithmetic", "rl_config.actor_resource.num_npus=8"]
    launch_file.write_text(
        launch_file.read_text().replace("tensor_model_parallel_size: 2", "tensor_model_parallel_size: 8")
    )
    assert launch.main(["--config", str(launch_file), "--dry-run", *overrides]) == 2
    said = capsys.readouterr().err
    assert "train.tensor_parallel=8 does not divide the model's" in said
    assert "actor_config.tensor_model_parallel_size)" in said
    assert f"{launch_file}:" in said


def test_without_raw_prompts_the_error_says_what_to_set(launch_file: Path, capsys) -> None:
    assert launch.main(["--config", str(launch_file), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "megatron_training.data_path=./data" in said
    assert "data.train_path=FILE" in said
    assert said.count("\n") == 1


def test_a_quantized_model_trains_with_adapters_only(launch_file: Path, capsys) -> None:
    overrides = ["data.train_path=arithmetic", "actor_config.lora_target_modules=null"]
    assert launch.main(["--config", str(launch_file), "--dry-run", *overrides]) == 2
    said = capsys.readouterr().err
    assert "lora.rank=0 trains every weight" in said
    assert "actor_config.lora_target_modules" in said
