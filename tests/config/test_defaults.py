"""A launch file may stand on others, which `defaults` names."""

from pathlib import Path

import pytest

from qerl_rl.config.errors import ConfigError
from qerl_rl.config.loader import load_config


def write(folder: Path, own: str, base: str = "cluster: {environment: {A: 1, B: 2}}\nrun:\n  steps: 7\n") -> Path:
    (folder / "envs").mkdir()
    (folder / "envs" / "base.yaml").write_text(base)
    path = folder / "launch.yaml"
    path.write_text(own)
    return path


def test_its_own_keys_count_before_those_of_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "defaults:\n  - envs: base\ncluster: {environment: {B: 3}, workers: 4}\n")
    loaded = load_config(path, ["run.seed=5"])
    assert loaded.config.cluster.environment == {"A": "1", "B": "3"}
    assert (loaded.config.cluster.workers, loaded.config.run.steps, loaded.config.run.seed) == (4, 7, 5)
    assert loaded.locate("run.steps") == f"{tmp_path}/envs/base.yaml:3"
    assert loaded.locate("cluster.workers") == f"{path}:3"
    assert loaded.locate("run.seed") == "command line"


def test_an_unknown_key_of_a_default_is_located_in_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, "defaults: [{envs: base}]\n", "run: {step: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown key run\.step\..*envs/base\.yaml:1"):
        load_config(path)


@pytest.mark.parametrize(
    ("defaults", "problem"),
    [("[{envs: bas}]", "write base"), ("[{envs: other}]", "put other.yaml into"), ("[base]", "write `- FOLDER: NAME`")],
)
def test_a_default_that_is_not_there_is_named(tmp_path: Path, defaults: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"defaults: {defaults}\n"))
    assert problem in caught.value.fix
    assert caught.value.where.endswith("launch.yaml:1")


def test_a_default_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"envs/base\.yaml is not readable YAML"):
        load_config(write(tmp_path, "defaults: [{envs: base}]\n", "a: [\n"))
