"""A critic or a reward model that can't sit beside the policy is refused before any process starts."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import launch
from tests.train.test_value_engine import classifier


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_w8a8, tiny_checkpoint):
    """Model folders by what is special about them, and a launch file."""
    root = tmp_path_factory.mktemp("models")
    found = {"policy": tiny_w8a8("qwen3_moe"), "no head": tiny_checkpoint("qwen3_moe"), "empty": root / "empty"}
    found["empty"].mkdir()
    found["judge"] = classifier(found["no head"], root / "judge")
    found["other tokens"] = shutil.copytree(found["judge"], root / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(found["other tokens"])
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(found["other tokens"])
    found["other family"] = shutil.copytree(found["judge"], root / "family")
    config = json.loads((found["other family"] / "config.json").read_text())
    (found["other family"] / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    found["short"] = shutil.copytree(found["judge"], root / "short")
    (found["short"] / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    (root / "launch.yaml").write_text(
        f"run: {{steps: 2, output_dir: {root}/run}}\n"
        f"model: {{path: {found['policy']}, max_length: 64}}\n"
        "rollout: {max_prompt_tokens: 24, max_response_tokens: 16}\n"
        "data: {train_path: arithmetic}\n"
    )
    return {**{name: str(path) for name, path in found.items()}, "launch": str(root / "launch.yaml")}


JUDGE = ["reward_model.backend=megatron"]
PPO = ["algorithm.name=ppo", "algorithm.advantage=gae"]


def dry_run(folders, key, model, overrides):
    return launch.main(["--config", folders["launch"], "--dry-run", *overrides, f"{key}={folders[model]}"])


@pytest.mark.parametrize(
    ("key", "model", "overrides", "problem", "fix"),
    [
        ("critic.path", "empty", PPO, "holds no config.json", "set critic.path to a model folder"),
        ("critic.path", "other tokens", PPO, "another tokenizer", "set critic.path to"),
        ("critic.path", "other family", PPO, "model_type=bert", "use a model of the families"),
        ("reward_model.path", "other tokens", JUDGE, "another tokenizer", "reward_model.backend to hf"),
        ("reward_model.path", "no head", JUDGE, "has no score.weight", "num_labels=1"),
        ("reward_model.path", "short", JUDGE, "reads 32 tokens", "to 32"),
        ("reward_model.path", "judge", [*JUDGE, "reward_model.max_length=39"], "reads 39 tokens", "max_length to 0"),
    ],
)
def test_models_that_can_not_sit_beside_the_policy(folders, capsys, key, model, overrides, problem, fix):
    assert dry_run(folders, key, model, overrides) == 2
    message = capsys.readouterr().err
    assert message.startswith("config error: ")
    assert problem in message
    assert fix in message
    assert message.count("\n") == 1


def test_a_critic_of_which_every_weight_trains_is_not_quantized(folders, capsys):
    whole = [*PPO, "lora.rank=0", f"model.path={folders['no head']}"]
    assert dry_run(folders, "critic.path", "no head", whole) == 0
    capsys.readouterr()
    assert dry_run(folders, "critic.path", "policy", whole) == 2
    message = capsys.readouterr().err
    assert "holds w8a8, but with lora.rank=0 all weights of the critic train" in message
    assert "set critic.path to a checkpoint in bfloat16 or float32" in message


@pytest.mark.parametrize(
    ("key", "model", "overrides"),
    [("critic.path", "judge", PPO), ("critic.path", "no head", PPO), ("reward_model.path", "judge", JUDGE)],
)
def test_models_with_the_policys_tokens_pass(folders, key, model, overrides):
    assert dry_run(folders, key, model, overrides) == 0
