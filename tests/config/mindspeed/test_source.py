"""Defaults, model files, overrides and lines of a launch file in MindSpeed-RL's form."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qerl_rl.config.checks import check_config
from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import LoadedConfig
from tests.config.mindspeed.conftest import grpo

Load = Callable[..., LoadedConfig]


def line_of(path: str, key: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(number for number, line in enumerate(lines, start=1) if line.strip().startswith(f"{key}:"))


def test_a_role_counts_before_the_training_section_and_that_before_the_model_file(load: Load) -> None:
    sections = grpo()
    for section, rate in (("megatron_training", 3e-6), ("actor_config", 2e-6)):
        sections[section]["lr"] = rate
    assert load(sections, model={"lr": 4e-6}).config.train.learning_rate == 2e-6
    del sections["actor_config"]["lr"]
    assert load(sections, model={"lr": 4e-6}).config.train.learning_rate == 3e-6
    del sections["megatron_training"]["lr"]
    assert load(sections, model={"lr": 4e-6}).config.train.learning_rate == 4e-6


def test_overrides_may_be_keys_of_theirs_and_of_ours_and_ours_count_last(load: Load) -> None:
    config = load(grpo(), "actor_config.lr=1e-4", "run.steps=3", "rl_config.mini_batch_size=8").config
    assert (config.train.learning_rate, config.run.steps, config.algorithm.prompts_per_mini_batch) == (1e-4, 3, 8)
    assert load(grpo(), "actor_config.lr=1e-4", "train.learning_rate=2e-4").config.train.learning_rate == 2e-4


def test_a_fault_is_located_at_their_key_and_line(load: Load) -> None:
    sections = grpo()
    sections["actor_config"]["tensor_model_parallel_size"] = 3
    loaded = load(sections)
    with pytest.raises(ConfigError) as caught:
        check_config(loaded.config, loaded.locate)
    file, _, rest = caught.value.where.partition(":")
    line, _, name = rest.partition(", ")
    assert name == "actor_config.tensor_model_parallel_size"
    assert int(line) == line_of(file, "tensor_model_parallel_size")
    again = load(grpo(), "actor_config.tensor_model_parallel_size=3")
    assert again.locate("train.tensor_parallel") == "command line, actor_config.tensor_model_parallel_size"
    assert load(grpo()).locate("train.weight_decay").endswith(", actor_config.weight_decay")
    assert load(grpo()).locate("train.adam_beta1").endswith("actor_config.adam_beta1 by default")
    assert load(grpo(), "train.adam_beta1=0.8").locate("train.adam_beta1") == "command line"


@pytest.mark.parametrize(
    ("section", "key", "fix"),
    [
        ("actor_config", "tensor_model_paralel_size", "actor_config.tensor_model_parallel_size"),
        ("rl_config", "n_sample_per_prompt", "rl_config.n_samples_per_prompt"),
        ("generate_config", "lora_target_modules", "write it in megatron_training"),
        ("rl_config", "zzz", "leave it out"),
        ("megatron_trainin", "lr", "megatron_training"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_and_its_line(load: Load, section: str, key: str, fix: str) -> None:
    sections = grpo()
    sections.setdefault(section, {})[key] = 1
    with pytest.raises(ConfigError) as caught:
        load(sections)
    assert "unknown" in caught.value.problem
    assert fix in caught.value.fix
    assert "grpo_small.yaml:" in caught.value.where


@pytest.mark.parametrize("section", ["generate_config", "model_file"])
def test_unknown_keys_of_subsections_and_model_files_are_found_too(load: Load, section: str) -> None:
    sections = grpo()
    if section == "model_file":
        with pytest.raises(ConfigError, match=r"model\.small_moe\.num_layer\b.*small_moe\.yaml:\d"):
            load(sections, model={"num_layer": 4})
        return
    sections["generate_config"]["sampling_config"]["top_q"] = 1
    with pytest.raises(ConfigError, match=r"sampling_config\.top_q.*sampling_config\.top_p"):
        load(sections)


def test_values_that_are_computed_with_have_their_type_checked(load: Load) -> None:
    sections = grpo()
    sections["actor_config"]["expert_model_parallel_size"] = "two"
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size='two' is not a whole number"):
        load(sections)
    sections = grpo()
    sections["actor_config"]["weight_decay"] = "much"
    with pytest.raises(ConfigError, match=r"train\.weight_decay='much'.*actor_config\.weight_decay"):
        load(sections)


def test_a_missing_model_file_and_other_defaults_are_errors(load: Load) -> None:
    sections = grpo()
    load(sections)
    sections["defaults"] = [{"model": ["small_mo"]}]
    with pytest.raises(ConfigError, match=r"no model file .*small_mo\.yaml.*name small_moe"):
        load(sections)
    sections["defaults"] = [{"trainer": "x"}]
    with pytest.raises(ConfigError, match=r"write `- model: \[NAME\]`"):
        load(sections)


def test_interpolation_and_yaml_numbers_are_read_as_theirs(load: Load) -> None:
    sections = grpo()
    sections["actor_config"]["lr"] = "${megatron_training.lr}"
    sections["megatron_training"]["lr"] = 3e-6
    assert load(sections).config.train.learning_rate == 3e-6


def test_the_runtime_environment_is_taken_but_for_what_would_contradict(load: Load, tmp_path: Path) -> None:
    variables = {
        "HCCL_CONNECT_TIMEOUT": "1800",
        "VLLM_VERSION": "0.0.1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_BUFFSIZE": "8",
    }
    (tmp_path / "configs" / "envs").mkdir(parents=True)
    (tmp_path / "configs" / "envs" / "runtime_env.yaml").write_text(yaml.safe_dump({"env_vars": variables}))
    loaded = load(grpo())
    # rl_config.hccl_buffersize says the buffer, 256 MB by default.
    assert loaded.config.cluster.environment == {"HCCL_CONNECT_TIMEOUT": "1800", "HCCL_BUFFSIZE": "256"}
    for name in ("VLLM_VERSION", "PYTORCH_NPU_ALLOC_CONF"):
        assert any(name in sentence for sentence in loaded.translation.differs)


def test_a_runtime_environment_that_is_named_must_exist(load: Load) -> None:
    sections = grpo()
    sections["rl_config"]["runtime_env_path"] = "configs/envs/other.yaml"
    with pytest.raises(ConfigError, match=r"other\.yaml.*rl_config\.runtime_env_path"):
        load(sections)
